# The same random operations to two servers: equal bytes and equal errors.
# Usage: differential.py SEED COUNT SOCKET EXPORT MODEL-SOCKET
import random
import sys

import nbd

seed, count = int(sys.argv[1]), int(sys.argv[2])
rnd = random.Random(seed)


def connect(socket, export):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_export_name(export)
    h.connect_unix(socket)
    return h


ours, model = connect(sys.argv[3], sys.argv[4]), connect(sys.argv[5], "")
size = ours.get_size()
assert size == model.get_size()
FLAGS = [nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_DF, 1 << 9, 1 << 15]
LEGAL = {"pread": [nbd.CMD_FLAG_DF], "pwrite": [nbd.CMD_FLAG_FUA], "zero": [nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE], "trim": [nbd.CMD_FLAG_FUA], "flush": [], "cache": []}
# Where the protocol leaves the answer to the server, nothing is compared.
LEFT_OPEN = {("flush", nbd.CMD_FLAG_FUA), ("cache", nbd.CMD_FLAG_FUA), ("pread", nbd.CMD_FLAG_FUA)}
HOT = 4 << 20  # most operations meet here


def length():
    kind = rnd.randrange(10)
    if kind < 4:
        return rnd.randrange(1, 2048)  # parts of blocks
    if kind < 9:
        return 512 * rnd.randrange(1, 256)
    return rnd.randrange(1, 1 << 20)


def place(n):
    kind = rnd.randrange(20)
    if kind < 10:
        return rnd.randrange(0, HOT)
    if kind < 16:
        return 512 * rnd.randrange(0, HOT // 512)
    if kind < 18:
        return rnd.randrange(0, size - n)
    if kind < 19:
        return max(0, size - rnd.randrange(0, 2 * n))  # about the end
    return rnd.randrange(size, 1 << 63)


def run(h, op, args):
    try:
        return getattr(h, op)(*args), None
    except nbd.Error as e:
        return None, e.errno


seen = {}
for i in range(count):
    op = rnd.choice(["pread", "pwrite", "pwrite", "pwrite", "zero", "trim", "flush", "cache"])
    n = length()
    at = place(n)
    flags = 0
    if rnd.randrange(3) == 0 and LEGAL[op]:
        flags |= rnd.choice(LEGAL[op])
    elif rnd.randrange(12) == 0:
        flags |= rnd.choice(FLAGS)
    if (op, flags) in LEFT_OPEN:
        continue
    if flags & nbd.CMD_FLAG_FAST_ZERO and op == "zero":
        flags = 0  # whether it is fast is each server's own affair
    args = {"pread": (n, at, flags), "pwrite": (rnd.randbytes(n) if op == "pwrite" else b"", at, flags), "flush": (flags,)}.get(op, (n, at, flags))
    a, b = run(ours, op, args), run(model, op, args)
    what = "seed %d, operation %d: %s of %d at %d, flags %#x" % (seed, i, op, n, at, flags)
    # Of two faults either may be named.
    both = at + n > size and op != "flush" and flags not in [0] + LEGAL[op] and a[1] and b[1]
    assert a[1] == b[1] or both, "%s: error %s, the model has %s" % (what, a[1], b[1])
    assert a[0] == b[0], "%s: other bytes than the model's" % what
    seen[op, a[1] or "ok"] = seen.get((op, a[1] or "ok"), 0) + 1
    if op == "trim" and a[1] is None:  # what a trim leaves is undefined
        for h in (ours, model):
            h.zero(n, at)
    if i % 50 == 0:
        back = place(65536) % (size - 65536)
        assert ours.pread(65536, back) == model.pread(65536, back), what + ": the devices differ"
for at in range(0, size, 1 << 20):
    assert ours.pread(1 << 20, at) == model.pread(1 << 20, at), "the devices differ in the MiB at %d" % at
print("passed:", ", ".join("%s %s %d" % (k[0], k[1], v) for k, v in sorted(seen.items(), key=str)))
