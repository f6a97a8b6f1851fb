package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// built is a program of this repository, ready to run in the emulated machine.
func built(t *testing.T, pkg string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-o", binary, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // as in the package: PR_SET_IO_FLUSHER needs it
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", pkg, err, out)
	}
	return binary
}

// boot runs a script of this directory as root in an emulated machine; what it
// needs comes as env, NAME=VALUE each. The script's exit code must be 0.
func boot(t *testing.T, script string, seconds int, env ...string) (output string) {
	t.Helper()
	return bootWith(t, nil, script, seconds, env...)
}

// bootWith is boot with options of boot.sh.
func bootWith(t *testing.T, options []string, script string, seconds int, env ...string) (output string) {
	t.Helper()
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
	inside, err := filepath.Abs(script)
	if err != nil {
		t.Fatal(err)
	}
	run := filepath.Join(t.TempDir(), "run.sh")
	if err := os.WriteFile(run, fmt.Appendf(nil, "#!/bin/bash\n%s exec bash %s\n", strings.Join(env, " "), inside), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("bash", append(append([]string{"boot.sh"}, options...), run, fmt.Sprint(seconds))...)
	for _, v := range env { // what the machine itself is told
		if strings.HasPrefix(v, "LAB_") {
			cmd.Env = append(cmd.Environ(), v)
		}
	}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil || !strings.Contains(string(out), "VM-RC=0") {
		t.Errorf("the run in the emulated machine failed: %v", err)
	}
	return string(out)
}

// TestFailoverOnKernelDevice boots a kernel, makes /dev/nbd0 out of two LIO
// targets and cuts one path under a verified file system.
func TestFailoverOnKernelDevice(t *testing.T) {
	boot(t, "failover.sh", 400, "MPATHD="+built(t, "../../cmd/mpathd"), "GONBD="+built(t, "./gonbd"))
}

// TestUpgradeUnderLoad replaces the daemon several times under a verified file
// system.
func TestUpgradeUnderLoad(t *testing.T) {
	boot(t, "upgrade.sh", 400, "MPATHD="+built(t, "../../cmd/mpathd"))
}

// TestPackage installs, restarts, upgrades, kills and removes mpathd as a
// service of systemd's.
func TestPackage(t *testing.T) {
	if _, err := os.Stat("/lib/systemd/systemd"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("systemd is missing: run `make deps`")
		}
		t.Skip("systemd is missing: run `make deps`")
	}
	binary := built(t, "../../cmd/mpathd")
	deb := func(version string) string {
		dir := t.TempDir()
		if out, err := exec.Command("bash", "../../dist/deb.sh", binary, version, dir).CombinedOutput(); err != nil {
			t.Fatalf("package: %v: %s", err, out)
		}
		found, _ := filepath.Glob(filepath.Join(dir, "*.deb"))
		return found[0]
	}
	bootWith(t, []string{"--systemd"}, "package.sh", 420, "DEB="+deb("1.0.0"), "DEB2="+deb("9.9.9"))
}
