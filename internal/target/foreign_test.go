package target

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// run runs a foreign initiator, which must be there in CI.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed (libiscsi-bin, qemu-utils, qemu-block-extra)", name)
		}
		t.Skipf("%s is not installed", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestForeignInitiators(t *testing.T) {
	_, p, _ := newServer(t, Config{PowerOnUA: true})
	url := p.URL(0)
	if out := run(t, "iscsi-ls", "-s", "iscsi://"+p.Addr()); !strings.Contains(out, "iqn.test:a") || !strings.Contains(out, "DIRECT_ACCESS") {
		t.Errorf("iscsi-ls: %s", out)
	}
	if out := run(t, "iscsi-inq", url); !strings.Contains(out, "RAM DISK") {
		t.Errorf("iscsi-inq: %s", out)
	}
	for _, page := range []string{"0", "128", "131", "176", "177", "178"} {
		run(t, "iscsi-inq", "-e", "1", "-c", page, url)
	}
	out := run(t, "qemu-io", "-f", "raw",
		"-c", "write -P 7 0 1M", "-c", "read -P 7 0 1M", "-c", "write -P 9 4k 4k", "-c", "read -P 9 4k 4k",
		"-c", "write -P 3 10M 8M", "-c", "read -P 3 10M 8M", "-c", "write -z 10M 4M", "-c", "read -P 0 10M 4M",
		"-c", "discard 14M 1M", "-c", "read -P 0 14M 1M", "-c", "write -f -P 5 20M 64k", "-c", "flush",
		"-c", "aio_write -P 6 30M 1M", "-c", "aio_write -P 6 31M 1M", "-c", "aio_flush", "-c", "read -P 6 30M 2M",
		url)
	if strings.Contains(out, "verification failed") || strings.Contains(out, "rror") {
		t.Errorf("qemu-io: %s", out)
	}
	if out := run(t, "qemu-img", "info", "-f", "raw", url); !strings.Contains(out, "64 MiB") {
		t.Errorf("qemu-img info: %s", out)
	}
}

// The same initiator behind other negotiated values takes the other data paths.
func TestForeignInitiatorWithR2TOnly(t *testing.T) {
	_, p, _ := newServer(t, Config{
		InitialR2T: true, NoImmediateData: true, MaxRecvSegment: 8192, MaxBurst: 16384, FirstBurst: 512, Window: 2,
	})
	out := run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "read -P 7 0 1M", "-c", "flush", p.URL(0))
	if strings.Contains(out, "verification failed") || strings.Contains(out, "rror") {
		t.Errorf("qemu-io: %s", out)
	}
}
