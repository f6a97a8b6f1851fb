package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/realtarget"
	"github.com/stretchr/testify/require"
)

// unit is a disk behind two fault proxies, and mpathd over both.
type unit struct {
	*stack
	image string // of tgtd
}

const unitSize = 64 << 20

// newUnit starts one server, tgtd or the built-in target, with one disk.
func newUnit(t *testing.T, tgt bool, block int, params string) *unit {
	t.Helper()
	dir := t.TempDir()
	u := &unit{stack: &stack{t: t, control: filepath.Join(dir, "c"), sock: filepath.Join(dir, "n")}}
	u.uri = "nbd+unix:///disk?socket=" + u.sock
	args := []string{"run", "--attach", "none", "--control", u.control, "--nbd", "unix:" + u.sock, "--alias", "disk", "--initiator", "iqn.2026-11.example:i", "--polling-interval", "1s"}
	port, iqn, lun := realtarget.FreePort(t), "iqn.2026-11.example:unit", 0
	if tgt {
		realtarget.Need(t, "tgtd", "tgtadm")
		u.image, lun = filepath.Join(dir, "image"), 1
		require.NoError(t, os.WriteFile(u.image, nil, 0o600))
		require.NoError(t, os.Truncate(u.image, unitSize))
		d := &tgtd{t: t, control: port, port: port, image: u.image, iqn: iqn, params: params, block: block}
		d.start()
		t.Cleanup(d.kill)
	} else {
		srv := exec.Command(binary, "target", "-size", fmt.Sprint(unitSize), "-target", iqn, "-block-size", fmt.Sprint(block), "-portal", fmt.Sprintf("127.0.0.1:%d", port))
		require.NoError(t, srv.Start())
		t.Cleanup(func() { srv.Process.Kill(); srv.Wait() })
	}
	for i := range u.proxies {
		p, err := faultnet.New("127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", port))
		require.NoError(t, err)
		t.Cleanup(func() { p.Close() })
		u.proxies[i] = p
		args = append(args, fmt.Sprintf("iscsi://%s/%s/%d", p.Addr(), iqn, lun))
	}
	u.cmd = exec.Command(binary, args...)
	u.cmd.Stderr = &u.log
	require.NoError(t, u.cmd.Start())
	t.Cleanup(func() {
		u.cmd.Process.Signal(syscall.SIGTERM)
		u.cmd.Wait()
		if t.Failed() {
			t.Logf("mpathd says:\n%s", u.log.String())
		}
	})
	u.await("both paths up", func(m daemon.Maps) bool { return len(m.Maps) == 1 && m.Maps[0].Paths.Usable == 2 })
	return u
}

// sh runs Python on a libnbd handle h; what it prints is returned.
func (u *unit) sh(script string) string {
	u.t.Helper()
	sh := exec.Command("nbdsh", "-c", "h.set_strict_mode(0)", "-u", u.uri, "-c", strings.TrimSpace(script))
	sh.Env = append(os.Environ(), "PATH=/usr/bin:"+os.Getenv("PATH")) // the Python that has libnbd
	out, err := sh.CombinedOutput()
	require.NoError(u.t, err, "%s", out)
	return strings.TrimSpace(string(out))
}

// TestDisksOf4KiBBlocks has disks whose physical blocks are 4 KiB, with logical
// ones of 4096 (4Kn) and of 512 (512e): what NBD tells of them, verified I/O
// while a path is cut, requests of less than a block.
func TestDisksOf4KiBBlocks(t *testing.T) {
	realtarget.Need(t, "fio", "nbdsh", "nbdinfo")
	for _, c := range []struct {
		name   string
		tgt    bool
		block  int
		params string
	}{
		{"built-in 4Kn", false, 4096, ""},
		{"built-in 512e", false, 512, ""},
		{"tgtd 4Kn", true, 4096, ""},
		{"tgtd 512e", true, 512, ",lbppbe=3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			u := newUnit(t, c.tgt, c.block, c.params)
			m := u.maps().Maps[0]
			require.Equal(t, c.block, m.BlockSize)
			require.EqualValues(t, unitSize, m.Size)
			out, err := exec.Command("nbdinfo", "--json", u.uri).Output()
			require.NoError(t, err)
			var info struct {
				Exports []struct {
					Size      int64 `json:"export-size"`
					Minimum   int   `json:"block_size_minimum"`
					Preferred int   `json:"block_size_preferred"`
				}
			}
			require.NoError(t, json.Unmarshal(out, &info))
			require.Len(t, info.Exports, 1)
			require.EqualValues(t, unitSize, info.Exports[0].Size)
			require.Equal(t, c.block, info.Exports[0].Minimum)
			require.GreaterOrEqual(t, info.Exports[0].Preferred, 4096)
			require.Zero(t, info.Exports[0].Preferred%4096)

			fio := exec.Command("fio", "--name=v", "--ioengine=nbd", "--uri="+u.uri, "--rw=randwrite", "--bs=4k-64k", "--blockalign=4k", "--iodepth=16", "--size=32m",
				"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--rate=24m")
			fio.Dir = t.TempDir()
			var said bytes.Buffer
			fio.Stdout, fio.Stderr = &said, &said
			require.NoError(t, fio.Start())
			for range 2 {
				time.Sleep(700 * time.Millisecond)
				u.proxies[0].Reset()
				time.Sleep(300 * time.Millisecond)
				u.proxies[1].Reset()
			}
			require.NoError(t, fio.Wait(), "%s", &said)

			// The last blocks of the disk, and the byte where they must be.
			u.sh(fmt.Sprintf("h.pwrite(b'\\x5a' * 8192, %d); h.flush()", unitSize-8192))
			require.Equal(t, "True", u.sh(fmt.Sprintf("print(h.pread(12288, %d)[4096:] == b'\\x5a' * 8192)", unitSize-12288)))
			if c.tgt {
				disk, err := os.ReadFile(u.image)
				require.NoError(t, err)
				require.True(t, bytes.Equal(bytes.Repeat([]byte{0x5a}, 8192), disk[unitSize-8192:]))
			}

			// Less than 4 KiB, and what does not begin with a block.
			got := u.sh(`
h.pwrite(b'\x11' * 8192, 65536)
for name, f in (("read", lambda: h.pread(512, 65536 + 512)), ("write", lambda: h.pwrite(b'\x22' * 512, 65536 + 512)),
                ("zero", lambda: h.zero(512, 65536 + 1024)), ("trim", lambda: h.trim(512, 65536 + 3072)), ("byte", lambda: h.pread(100, 65536))):
    try:
        f()
        print(name, "done")
    except nbd.Error as e:
        print(name, e.errno)
b = h.pread(8192, 65536)
print([b[i * 512] for i in range(16)], len(set(b[4096:])))`)
			trim := "trim done"
			if c.tgt { // not told as possible
				trim = "trim EINVAL"
			}
			require.Equal(t, "read done\nwrite done\nzero done\n"+trim+"\nbyte done\n[17, 34, 0, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17] 1", got)
			// Pieces of one block, written at the same time: none may undo another.
			require.Equal(t, "True", u.sh(`
import random
ok = True
for round in range(1, 40):
    at = 1 << 20
    cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([round ^ i]) * 512), at + i * 512) for i in random.sample(range(16), 16)]
    while cookies:
        h.poll(-1)
        cookies = [c for c in cookies if not h.aio_command_completed(c)]
    b = h.pread(8192, at)
    ok = ok and b == b"".join(bytes([round ^ i]) * 512 for i in range(16))
print(ok)`))
			u.await("whole", func(m daemon.Maps) bool { return m.Maps[0].Paths.Usable == 2 })
		})
	}
}

// TestTrimsAndZeroes has disks that know UNMAP and WRITE SAME, and one that does
// not: trims give space back or are not offered, zeroes are zeroes.
func TestTrimsAndZeroes(t *testing.T) {
	realtarget.Need(t, "nbdsh")
	for _, c := range []struct {
		name   string
		tgt    bool
		block  int
		params string
		unmaps bool
	}{
		{"built-in", false, 512, "", true},
		{"built-in 4Kn", false, 4096, "", true},
		{"tgtd", true, 512, "", false},
		{"tgtd thin", true, 512, ",thin_provisioning=1", true},
		{"tgtd thin 4Kn", true, 4096, ",thin_provisioning=1", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			u := newUnit(t, c.tgt, c.block, c.params)
			used := func() int64 {
				var st syscall.Stat_t
				require.NoError(t, syscall.Stat(u.image, &st))
				return st.Blocks * 512
			}
			got := u.sh(`
M = 1 << 20
a = b'\x77' * M
for i in range(16): h.pwrite(a, i * M)
h.flush()
print("can trim", h.can_trim())
if h.can_trim(): h.trim(8 * M, 0)
h.flush()
print("trimmed", set(h.pread(8 * M, 0)), set(h.pread(M, 8 * M)))
h.zero(4 * M + 4096, 10 * M - 4096)
h.flush()
print("zeroed", set(h.pread(4 * M + 4096, 10 * M - 4096)), set(h.pread(4096, 10 * M - 8192)), set(h.pread(4096, 14 * M)))
h.zero(M, 0, nbd.CMD_FLAG_NO_HOLE)
print("kept", set(h.pread(M, 0)))`)
			want := "can trim True\ntrimmed {0} {119}\nzeroed {0} {119} {119}\nkept {0}"
			if !c.unmaps {
				want = strings.Replace(strings.Replace(want, "True", "False", 1), "{0}", "{119}", 1)
			}
			require.Equal(t, want, got)
			if c.tgt {
				if c.unmaps {
					require.Less(t, used(), int64(9<<20), "space was given back")
				} else {
					require.GreaterOrEqual(t, used(), int64(8<<20))
				}
				disk, err := os.ReadFile(u.image)
				require.NoError(t, err)
				filled := bytes.Repeat([]byte{0x77}, 2<<20)
				require.True(t, bytes.Equal(filled[4096:], disk[8<<20:10<<20-4096]), "data before the zeroes")
				require.True(t, bytes.Equal(filled, disk[14<<20:16<<20]), "data behind the zeroes")
				require.True(t, bytes.Equal(make([]byte, 4<<20+4096), disk[10<<20-4096:14<<20]), "zeroes")
			}
		})
	}
}
