package realtarget

import (
	"os"
	"os/exec"
	"path/filepath"
)

// slowWrites makes one write to a file last two seconds when the file named by
// SLOW exists; it is loaded into a target before the C library.
const slowWrites = `#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
static void maybe(int fd)
{
	struct stat st;
	const char *flag = getenv("SLOW");
	if (flag && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && unlink(flag) == 0)
		sleep(2);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o)
{
	static ssize_t (*next)(int, const void *, size_t, off64_t);
	if (!next)
		next = dlsym(RTLD_NEXT, "pwrite64");
	maybe(fd);
	return next(fd, b, n, o);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { return pwrite64(fd, b, n, o); }
ssize_t write(int fd, const void *b, size_t n)
{
	static ssize_t (*next)(int, const void *, size_t);
	if (!next)
		next = dlsym(RTLD_NEXT, "write");
	maybe(fd);
	return next(fd, b, n);
}
`

// preload builds slowWrites and puts it into the target's environment.
func (b *base) preload() {
	if !b.o.Slow {
		return
	}
	Need(b.t, "gcc")
	dir := b.t.TempDir()
	src, lib := filepath.Join(dir, "slow.c"), filepath.Join(dir, "slow.so")
	b.slow = filepath.Join(dir, "slow")
	if err := os.WriteFile(src, []byte(slowWrites), 0o600); err != nil {
		b.t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-shared", "-fPIC", "-o", lib, src, "-ldl").CombinedOutput(); err != nil {
		b.t.Fatalf("gcc: %v: %s", err, out)
	}
	b.env = append(b.env, "LD_PRELOAD="+lib, "SLOW="+b.slow)
}

// Slow makes the next write to the disk's file take two seconds.
func (b *base) Slow() {
	if err := os.WriteFile(b.slow, nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
}
