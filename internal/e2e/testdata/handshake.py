# Corner cases of handshake and transmission, by libnbd. Usage: handshake.py SOCKET EXPORT
import errno
import sys

import nbd

socket, export = sys.argv[1:3]


def connect(prepare=lambda h: None, name=export, contexts=()):
    h = nbd.NBD()
    h.set_strict_mode(0)  # send what is wrong, too
    h.set_export_name(name)
    for c in contexts:
        h.add_meta_context(c)
    prepare(h)
    h.connect_unix(socket)
    return h


def fails(what, want, f):
    try:
        f()
    except nbd.Error as e:
        assert want is None or e.errno == errno.errorcode[want], "%s: %s instead of %s" % (what, e, want and errno.errorcode[want])
        return
    raise AssertionError("%s: succeeds" % what)


def works(h):
    h.pwrite(b"x" * 4096, 8192)
    assert h.pread(4096, 8192) == b"x" * 4096


h = connect()
size = h.get_size()
assert h.get_protocol() == "newstyle-fixed"
assert h.get_structured_replies_negotiated()
assert (h.get_block_size(nbd.SIZE_MINIMUM), h.get_block_size(nbd.SIZE_MAXIMUM)) == (512, 32 << 20)
for can in (h.can_flush, h.can_fua, h.can_zero, h.can_trim, h.can_multi_conn, h.can_cache, h.can_df):
    assert can(), can
assert not h.is_read_only()
works(h)
# FUA is legal on every command, and zero bytes on each that has a range.
h.pwrite(b"y" * 512, 0, nbd.CMD_FLAG_FUA)
assert h.pread(512, 0, nbd.CMD_FLAG_DF) == b"y" * 512
h.zero(512, 0, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, 4096, nbd.CMD_FLAG_FUA)
h.cache(4096, 0)
h.flush()
h.pwrite(b"", 512)
h.zero(0, 512)
h.trim(0, size)
assert h.pread(1, size - 1) == b"\0"
# Each of these is answered, and the connection goes on.
for what, want, f in (
    ("read beyond the end", errno.EINVAL, lambda: h.pread(512, size)),
    ("read across the end", errno.EINVAL, lambda: h.pread(1024, size - 512)),
    ("write beyond the end", errno.ENOSPC, lambda: h.pwrite(b"z" * 512, size)),
    ("write across the end", errno.ENOSPC, lambda: h.pwrite(b"z" * 1024, size - 512)),
    ("write at the end of numbers", errno.ENOSPC, lambda: h.pwrite(b"z" * 512, (1 << 63) - 512)),
    ("zero beyond the end", errno.ENOSPC, lambda: h.zero(512, size)),
    ("trim beyond the end", errno.EINVAL, lambda: h.trim(512, size)),
    ("unknown flag of a write", errno.EINVAL, lambda: h.pwrite(b"z" * 512, 0, 1 << 9)),
    ("unknown flag of a read", errno.EINVAL, lambda: h.pread(512, 0, 1 << 9)),
    ("FAST_ZERO on a write", errno.EINVAL, lambda: h.pwrite(b"z" * 512, 0, nbd.CMD_FLAG_FAST_ZERO)),
    ("NO_HOLE on a trim", errno.EINVAL, lambda: h.trim(512, 0, nbd.CMD_FLAG_NO_HOLE)),
    ("block status without a context", errno.EINVAL, lambda: h.block_status(512, 0, lambda *a: 0)),
):
    fails(what, want, f)
    works(h)
assert h.pread(512, 0) == b"\0" * 512  # none of them changed anything
h.shutdown()

# Without structured replies, and with the oldest handshake that there is.
h = connect(lambda h: h.set_request_structured_replies(False))
assert not h.get_structured_replies_negotiated() and not h.can_df()
works(h)
fails("simple reply to a read beyond the end", errno.EINVAL, lambda: h.pread(512, size))
works(h)
h.shutdown()
for flags in (0, nbd.HANDSHAKE_FLAG_NO_ZEROES, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE):
    h = connect(lambda h: h.set_handshake_flags(flags))
    assert h.get_size() == size
    works(h)
    h.shutdown()

# Meta contexts.
h = connect(contexts=("base:allocation", "x-mpathd:path", "nobody:knows"))
assert h.can_meta_context("base:allocation") and h.can_meta_context("x-mpathd:path") and not h.can_meta_context("nobody:knows")
seen = {}


def extents(context, offset, entries, err):
    seen[context] = sum(entries[::2])
    return 0


h.block_status(1 << 20, 0, extents)
assert seen == {"base:allocation": 1 << 20, "x-mpathd:path": 1 << 20} or all(0 < v <= 1 << 20 for v in seen.values()) and len(seen) == 2, seen
h.block_status(1 << 20, 0, extents, nbd.CMD_FLAG_REQ_ONE)
fails("block status across the end", errno.EINVAL, lambda: h.block_status(1024, size - 512, extents))
works(h)
h.shutdown()

# Options one by one.
h = connect(lambda h: h.set_opt_mode(True))
names = []
assert h.opt_list(lambda n, d: names.append(n) or 0) == 1 and names == [export], names
listed = []
h.opt_list_meta_context(lambda n: listed.append(n) or 0)
assert set(listed) >= {"base:allocation", "x-mpathd:path"}, listed
h.set_export_name("nobody")
fails("INFO of an unknown export", errno.ENOENT, h.opt_info)
fails("GO to an unknown export", errno.ENOENT, h.opt_go)
h.set_export_name("n" * 4096)
fails("a name of 4096 bytes", errno.ENOENT, h.opt_info)
h.set_export_name("")
h.opt_info()  # the only export
assert h.get_size() == size
h.set_export_name(export)
for _ in range(20):
    h.opt_info()
h.opt_go()
works(h)
h.shutdown()
h = connect(lambda h: h.set_opt_mode(True))
h.opt_abort()
h = connect(lambda h: h.set_opt_mode(True))
fails("more options than anybody needs", None, lambda: [h.opt_info() for _ in range(200)])
fails("an unknown export", None, lambda: connect(name="nobody"))
fails("TLS where there is none", None, lambda: connect(lambda h: h.set_tls(nbd.TLS_REQUIRE)))

# What one connection wrote and had answered, another one reads.
a, b = connect(), connect()
for i in range(200):
    a.pwrite(bytes([i]) * 512, 512 * i)
    assert b.pread(512, 512 * i) == bytes([i]) * 512
del a
works(b)
print("passed")
