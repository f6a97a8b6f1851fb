package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mpathd/mpathd/internal/realtarget"
)

// systemPython has python3-libnbd; another one may come first in PATH.
const systemPython = "/usr/bin/python3"

// run is a command's output; it must succeed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func needLibnbd(t *testing.T) {
	t.Helper()
	if err := exec.Command(systemPython, "-c", "import nbd").Run(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("python3-libnbd is missing: run `make deps`")
		}
		t.Skip("python3-libnbd is missing: run `make deps`")
	}
}

// memoryServer is nbdkit's memory plugin, of the size of the stack's disk.
func memoryServer(t *testing.T) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "model.sock")
	cmd := exec.Command("nbdkit", "-f", "-U", socket, "memory", "256M")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
		if time.Now().After(end) {
			t.Fatal("nbdkit does not come up")
		}
	}
}

// TestClientsOfOthers runs what nobody here wrote against a thin unit.
func TestClientsOfOthers(t *testing.T) {
	t.Parallel()
	realtarget.Need(t, "nbdkit", "nbdcopy", "nbdinfo", "qemu-img", "qemu-io", "fio")
	needLibnbd(t)
	s := newStackWith(t, ",thin_provisioning=1")
	t.Run("handshake by libnbd", func(t *testing.T) {
		run(t, systemPython, "testdata/handshake.py", s.sock, "xensan")
	})
	t.Run("differential against nbdkit memory", func(t *testing.T) {
		model := memoryServer(t)
		run(t, "nbdcopy", s.uri, "nbd+unix:///?socket="+model)
		for seed := range 3 {
			t.Log(run(t, systemPython, "testdata/differential.py", fmt.Sprint(seed+1), "2500", s.sock, "xensan", model))
		}
	})
	t.Run("many connections of nbdcopy", func(t *testing.T) {
		dir := t.TempDir()
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		f, err := os.Create(src)
		if err != nil {
			t.Fatal(err)
		}
		f.Truncate(256 << 20) // with holes, and random data between them
		for at := int64(0); at < 256<<20; at += 16 << 20 {
			b := make([]byte, 8<<20)
			for i := range b {
				b[i] = byte(at>>20) ^ byte(i*i>>8)
			}
			f.WriteAt(b, at)
		}
		f.Close()
		run(t, "nbdcopy", "--connections=16", "--threads=16", "--requests=32", "--flush", src, s.uri)
		run(t, "nbdcopy", "--connections=16", "--threads=16", "--allocated", s.uri, dst)
		run(t, "cmp", src, dst)
		t.Run("qemu-img", func(t *testing.T) {
			if out := run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src, s.uri); !strings.Contains(out, "identical") {
				t.Error(out)
			}
			run(t, "qemu-img", "convert", "-n", "-p", "-W", "-m", "16", "-f", "raw", "-O", "raw", dst, s.uri)
			run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src, s.uri)
			if out := run(t, "qemu-img", "map", "--output=json", "-f", "raw", s.uri); !strings.Contains(out, `"start": 0`) || !strings.Contains(out, `"data": true`) {
				t.Error(out)
			}
			run(t, "qemu-img", "bench", "-f", "raw", "-c", "5000", "-d", "32", "-s", "4k", "-w", "--flush-interval=64", s.uri)
			run(t, "qemu-img", "bench", "-f", "raw", "-c", "5000", "-d", "32", "-s", "4k", s.uri)
		})
	})
	t.Run("fio with trim and verify", func(t *testing.T) {
		// trim_percentage corrupts fio 3.33's own heap with this engine: trims come
		// from a job of their own, beside one that verifies.
		job := []string{"--ioengine=nbd", "--uri=" + s.uri, "--bs=4k-64k", "--iodepth=32", "--size=64m"}
		out := run(t, "fio", append(append([]string{"--name=v", "--rw=randwrite", "--fsync=64", "--verify=crc32c", "--verify_backlog=256", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1"}, job...),
			append([]string{"--name=t", "--rw=randtrimwrite", "--offset=128m"}, job...)...)...)
		if strings.Count(out, "err= 0") != 2 {
			t.Error(out)
		}
	})
	t.Run("nbdkit's nbd plugin", func(t *testing.T) {
		// A copy-on-write layer over it reads only, then writes go through it.
		out := run(t, "nbdkit", "-U", "-", "--filter=cow", "nbd", "uri="+s.uri, "--run", `nbdinfo "$uri" && qemu-io -f raw -c "write -P 5 0 1M" -c "read -P 5 0 1M" -c "flush" "$uri"`)
		if !strings.Contains(out, "export-size: 268435456") || strings.Contains(out, "failed") {
			t.Error(out)
		}
		out = run(t, "nbdkit", "-U", "-", "nbd", "uri="+s.uri, "--run", `qemu-io -f raw -c "write -P 6 -f 64k 64k" -c "write -z -u 256k 64k" -c "discard 1M 1M" -c "read -P 6 64k 64k" -c "read -P 0 256k 64k" "$uri"`)
		if strings.Contains(out, "failed") {
			t.Error(out)
		}
		if out = run(t, "qemu-io", "-f", "raw", "-c", "read -P 6 64k 64k", s.uri); strings.Contains(out, "failed") {
			t.Error(out)
		}
	})
}

// TestClientsFallBack denies parts of the protocol to clients that would use them.
func TestClientsFallBack(t *testing.T) {
	realtarget.Need(t, "nbdcopy", "nbdinfo", "qemu-io", "qemu-img")
	for _, without := range []string{"structured", "extended,meta", "go,no-zeroes"} {
		t.Run(strings.ReplaceAll(without, ",", " "), func(t *testing.T) { // tgtd reads commas
			s := newStackWith(t, "", "--nbd-without", without)
			src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "dst")
			if err := os.WriteFile(src, []byte(strings.Repeat("0123456789abcdef", 16<<20/16)), 0o600); err != nil {
				t.Fatal(err)
			}
			info := run(t, "nbdinfo", s.uri)
			if strings.Contains(info, "simple packets") != (without == "structured") || strings.Contains(info, "base:allocation") {
				t.Error(info)
			}
			run(t, "nbdcopy", "--connections=2", src, s.uri)
			if out := run(t, "qemu-io", "-f", "raw", "-c", "read -v 0 16", "-c", "write -P 6 32m 64k", "-c", "read -P 6 32m 64k", "-c", "write -z 32m 64k", "-c", "read -P 0 32m 64k", "-c", "flush", s.uri); strings.Contains(out, "failed") {
				t.Error(out)
			}
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", s.uri, dst)
			run(t, "cmp", "-n", fmt.Sprint(16<<20), src, dst)
		})
	}
}
