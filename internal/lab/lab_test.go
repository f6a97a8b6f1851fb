package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestFailoverOnKernelDevice boots a kernel, makes /dev/nbd0 out of two LIO
// targets and cuts one path under a verified file system.
func TestFailoverOnKernelDevice(t *testing.T) {
	for _, tool := range []string{"qemu-system-x86_64", "busybox", "cpio", "modprobe", "nft", "mkfs.ext4", "fio"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is missing: run `make deps`", tool)
			}
			t.Skipf("%s is missing: run `make deps`", tool)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: the emulated machine reads this machine's root file system")
	}
	dir := t.TempDir()
	binary := filepath.Join(dir, "mpathd")
	if out, err := exec.Command("go", "build", "-o", binary, "../../cmd/mpathd").CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	gonbd := filepath.Join(dir, "gonbd")
	if out, err := exec.Command("go", "build", "-o", gonbd, "./gonbd").CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	inside, err := filepath.Abs("failover.sh")
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(dir, "run.sh")
	if err := os.WriteFile(script, fmt.Appendf(nil, "#!/bin/bash\nMPATHD=%s GONBD=%s exec bash %s\n", binary, gonbd, inside), 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("bash", "boot.sh", script, "240").CombinedOutput()
	t.Logf("%s", out)
	if err != nil || !strings.Contains(string(out), "VM-RC=0") {
		t.Errorf("the run in the emulated machine failed: %v", err)
	}
}
