package e2e

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/nbd/client"
)

var (
	ghostRounds = flag.Int("ghost-rounds", 1, "rounds of each late-write variant")
	ghostTable  = flag.String("ghost-table", "", "file to write the table of late-write rounds to")
)

// slowBackend makes one write of tgtd's backing store last two seconds when
// the file named by SLOW exists.
const slowBackend = `#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o)
{
	static ssize_t (*next)(int, const void *, size_t, off64_t);
	const char *flag = getenv("SLOW");
	if (!next)
		next = dlsym(RTLD_NEXT, "pwrite64");
	if (flag && unlink(flag) == 0)
		sleep(2);
	return next(fd, b, n, o);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { return pwrite64(fd, b, n, o); }
`

// variant is one way in which a write is under way when its path dies, and one
// way to change the same blocks afterwards.
type variant struct {
	name   string
	from   faultnet.Silent
	size   int
	slow   bool
	change func(c *client.Client, off int64, size int) error
	want   func(size int) []byte
}

func fill(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

func overwrite(c *client.Client, off int64, n int) error {
	_, err := c.WriteAt(fill(n, 'b'), off)
	return err
}

var variants = []variant{
	{"sent", faultnet.HoldAll, 4096, false, overwrite, func(n int) []byte { return fill(n, 'b') }},
	{"data pending", faultnet.HoldData, 32 << 10, false, overwrite, func(n int) []byte { return fill(n, 'b') }},
	{"slow backend", faultnet.HoldNothing, 4096, true, overwrite, func(n int) []byte { return fill(n, 'b') }},
	{"overlap", faultnet.HoldAll, 8192, false, func(c *client.Client, off int64, n int) error { return overwrite(c, off+4096, n-4096) },
		func(n int) []byte { return append(fill(4096, 'a'), fill(n-4096, 'b')...) }},
	{"trim", faultnet.HoldAll, 4096, false, func(c *client.Client, off int64, n int) error { return c.Trim(off, uint32(n)) }, func(n int) []byte { return make([]byte, n) }},
	{"write zeroes", faultnet.HoldAll, 4096, false, func(c *client.Client, off int64, n int) error { return c.WriteZeroes(off, uint32(n)) },
		func(n int) []byte { return make([]byte, n) }},
}

// haunted is one tgtd behind two portals that can fall silent, and mpathd.
type haunted struct {
	t       *testing.T
	control string
	slow    string
	sock    string
	args    []string
	portals [2]*faultnet.Late
	cmd     *exec.Cmd
	client  *client.Client
	log     bytes.Buffer
}

func newHaunted(t *testing.T, protection string) *haunted {
	need(t, "tgtd", "tgtadm", "gcc")
	dir := t.TempDir()
	h := &haunted{t: t, control: filepath.Join(dir, "c"), slow: filepath.Join(dir, "slow")}
	image := filepath.Join(dir, "image")
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 64<<20))
	src, lib := filepath.Join(dir, "slow.c"), filepath.Join(dir, "slow.so")
	require.NoError(t, os.WriteFile(src, []byte(slowBackend), 0o600))
	out, err := exec.Command("gcc", "-shared", "-fPIC", "-o", lib, src, "-ldl").CombinedOutput()
	require.NoError(t, err, "%s", out)
	port := freePort(t)
	d := &tgtd{t: t, control: 1000 + port%20000, port: port, image: image, iqn: "iqn.2009-01.nl.pref:storage.haunted",
		env: []string{"LD_PRELOAD=" + lib, "SLOW=" + h.slow}}
	d.start()
	t.Cleanup(d.kill)
	d.adm("--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "--params", "thin_provisioning=1")
	h.sock = filepath.Join(dir, "n")
	h.args = []string{"run", "--attach", "none", "--control", h.control, "--nbd", "unix:" + h.sock, "--alias", "m", "--failover-time", "400ms",
		"--initiator", "iqn.2006-07.com.example.intra:hannibal", "--polling-interval", "1s", "--ghost-protection", protection}
	for i := range h.portals {
		p, err := faultnet.NewLate(fmt.Sprintf("127.0.0.1:%d", port))
		require.NoError(t, err)
		t.Cleanup(p.Close)
		h.portals[i] = p
		h.args = append(h.args, d.url(p.Addr()))
	}
	h.start()
	t.Cleanup(func() {
		h.cmd.Process.Signal(syscall.SIGTERM)
		h.cmd.Wait()
		if t.Failed() {
			t.Logf("mpathd says:\n%s", h.log.String())
		}
	})
	h.settled()
	h.dial()
	return h
}

func (h *haunted) start() {
	h.cmd = exec.Command(binary, h.args...)
	h.cmd.Stderr = &h.log
	require.NoError(h.t, h.cmd.Start())
}

func (h *haunted) dial() {
	var err error
	require.Eventually(h.t, func() bool {
		h.client, err = client.Dial("unix", h.sock, "m")
		return err == nil
	}, 20*time.Second, 20*time.Millisecond)
	c := h.client
	h.t.Cleanup(func() { c.Close() })
}

// settled waits until both paths serve and nothing is at risk.
func (h *haunted) settled() {
	s := &stack{t: h.t, control: h.control}
	s.await("both paths up", func(m daemon.Maps) bool {
		return len(m.Maps) == 1 && m.Maps[0].Paths.Usable == 2 && m.Maps[0].Groups[0].Paths[0].Serving && len(m.Maps[0].Safety.Unfenced) == 0
	})
}

// round cuts the serving path under a write, lets the write fail over, changes
// its blocks, delivers the old bytes late, and looks. valid tells that there
// was something to deliver.
func (h *haunted) round(v variant, i int) (reverted, valid bool, took, changed time.Duration) {
	t, off := h.t, int64(1+i)<<20
	a := h.portals[0]
	_, err := h.client.WriteAt(fill(v.size, '0'), off)
	require.NoError(t, err)
	if v.slow {
		require.NoError(t, os.WriteFile(h.slow, nil, 0o600))
	}
	a.Silence(v.from)
	began := time.Now()
	watchdog := time.AfterFunc(40*time.Second, func() { panic("a request hangs; mpathd says:\n" + h.log.String()) })
	defer watchdog.Stop()
	_, err = h.client.WriteAt(fill(v.size, 'a'), off)
	require.NoError(t, err)
	took = time.Since(began)
	valid = a.Held() > 0 || v.slow
	require.NoError(t, v.change(h.client, off, v.size))
	changed = time.Since(began) - took
	if v.slow { // until the slow write has certainly happened
		time.Sleep(time.Until(began.Add(2500 * time.Millisecond)))
	}
	a.Deliver()
	time.Sleep(200 * time.Millisecond)
	got := make([]byte, v.size)
	_, err = h.client.ReadAt(got, off)
	require.NoError(t, err)
	reverted = !bytes.Equal(got, v.want(v.size))
	a.Heal()
	h.settled()
	return reverted, valid, took, changed
}

// TestLateWritesOnTgtd is the hazard itself on a real target: with protection
// no acknowledged write is reverted, and without it the same rounds revert.
func TestLateWritesOnTgtd(t *testing.T) {
	var table strings.Builder
	for _, protection := range []string{"hold", "strict", "off"} {
		t.Run(protection, func(t *testing.T) {
			h := newHaunted(t, protection)
			for k, v := range variants {
				var reverted, valid int
				var failover, change time.Duration
				for i := range *ghostRounds {
					r, ok, f, c := h.round(v, (k*7+i)%60)
					if ok {
						valid++
					}
					if r {
						reverted++
					}
					failover, change = max(failover, f), max(change, c)
				}
				line := fmt.Sprintf("| %s | %s | %d of %d | %v | %v |", protection, v.name, reverted, valid, failover.Round(time.Millisecond), change.Round(time.Millisecond))
				t.Log(line)
				fmt.Fprintln(&table, line)
				require.Equal(t, *ghostRounds, valid, "%s: rounds in which nothing was late prove nothing", v.name)
				if protection == "off" {
					require.NotZero(t, reverted, "%s: the control must revert, or the test proves nothing", v.name)
				} else {
					require.Zero(t, reverted, "%s", v.name)
				}
			}
		})
	}
	if *ghostTable != "" {
		require.NoError(t, os.WriteFile(*ghostTable, []byte(table.String()), 0o644))
	}
}

// TestCrashWithWritesUnderWay kills the daemon while a write is on its way, and
// lets it come back to a disk of which one portal is silent: the new run must
// end the old session before it writes.
func TestCrashWithWritesUnderWay(t *testing.T) {
	for _, protection := range []string{"hold", "off"} {
		t.Run(protection, func(t *testing.T) {
			h := newHaunted(t, protection)
			a := h.portals[0]
			off := int64(1 << 20)
			_, err := h.client.WriteAt(fill(4096, '0'), off)
			require.NoError(t, err)
			a.Silence(faultnet.HoldAll)
			go h.client.WriteAt(fill(4096, 'a'), off)
			require.Eventually(t, func() bool { return a.Held() >= 4096 }, 5*time.Second, time.Millisecond)
			h.cmd.Process.Kill()
			h.cmd.Wait()
			h.start()
			h.dial()
			began := time.Now()
			watchdog := time.AfterFunc(40*time.Second, func() { panic("the first write hangs; mpathd says:\n" + h.log.String()) })
			defer watchdog.Stop()
			require.NoError(t, overwrite(h.client, off, 4096))
			t.Logf("%s: first write of the new run after %v", protection, time.Since(began).Round(time.Millisecond))
			a.Deliver()
			time.Sleep(200 * time.Millisecond)
			got := make([]byte, 4096)
			_, err = h.client.ReadAt(got, off)
			require.NoError(t, err)
			if protection == "off" {
				require.Equal(t, fill(4096, 'a'), got, "the control must revert, or the test proves nothing")
			} else {
				require.Equal(t, fill(4096, 'b'), got, "an acknowledged write was reverted")
			}
			a.Heal()
			h.settled()
		})
	}
}
