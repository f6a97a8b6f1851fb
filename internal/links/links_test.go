package links_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// The tests run in a network namespace with two veth pairs to another one,
// where the targets are: as this same binary with a role.
const role = "MPATHD_LINKS_ROLE"

func TestMain(m *testing.M) {
	if os.Getenv(role) == "target" {
		serve()
		return
	}
	os.Exit(m.Run())
}

const iqn = "iqn.2026-11.example:links"

// serve is the target on both links, until stdin ends.
func serve() {
	lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity("links"))
	if err != nil {
		panic(err)
	}
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: []*target.LU{lu}}}})
	if err != nil {
		panic(err)
	}
	for _, a := range []string{"10.231.1.2:3260", "10.231.2.2:3260"} {
		if _, err := srv.Listen(a); err != nil {
			panic(err)
		}
	}
	fmt.Println("ready")
	bufio.NewReader(os.Stdin).ReadByte()
	srv.Kill()
}

func run(t *testing.T, args ...string) {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	require.NoError(t, err, "%v: %s", args, out)
}

// inside prepares the namespaces and runs the calling test in the near one. It
// reports true there.
func inside(t *testing.T) (far string, yes bool) {
	if far = os.Getenv(role); far != "" {
		return far, true
	}
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil || os.Getuid() != 0 {
			if os.Getenv("CI") == "true" {
				t.Fatalf("needs root and %s: run `make deps`", tool)
			}
			t.Skipf("needs root and %s: run `make deps`", tool)
		}
	}
	near := fmt.Sprintf("mpl%d-%d", os.Getpid(), time.Now().UnixNano()%1000)
	far = near + "t"
	for _, ns := range []string{near, far} {
		run(t, "ip", "netns", "add", ns)
		t.Cleanup(func() { exec.Command("ip", "netns", "del", ns).Run() })
		run(t, "ip", "-n", ns, "link", "set", "lo", "up")
	}
	for i := 1; i <= 2; i++ {
		dev := fmt.Sprint("san", i)
		run(t, "ip", "-n", near, "link", "add", dev, "type", "veth", "peer", "name", dev, "netns", far)
		for k, ns := range []string{near, far} {
			run(t, "ip", "-n", ns, "addr", "add", fmt.Sprintf("10.231.%d.%d/24", i, k+1), "dev", dev)
			run(t, "ip", "-n", ns, "link", "set", dev, "up")
		}
	}
	tgt := exec.Command("ip", "netns", "exec", far, os.Args[0])
	tgt.Env = append(os.Environ(), role+"=target")
	tgt.Stderr = os.Stderr
	in, err := tgt.StdinPipe()
	require.NoError(t, err)
	out, err := tgt.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, tgt.Start())
	t.Cleanup(func() { in.Close(); tgt.Wait() })
	line, _ := bufio.NewReader(out).ReadString('\n')
	require.Equal(t, "ready\n", line)
	cmd := exec.Command("ip", "netns", "exec", near, os.Args[0], "-test.v", "-test.run", "^"+t.Name()+"$", "-test.timeout", "100s")
	cmd.Env = append(os.Environ(), role+"="+far)
	b, err := cmd.CombinedOutput()
	t.Logf("%s", b)
	require.NoError(t, err)
	require.Contains(t, string(b), "--- PASS", "the test ran inside")
	return far, false
}

type change struct {
	st    initiator.State
	cause error
	at    time.Time
}

func open(t *testing.T, failover time.Duration) (*initiator.Session, chan change) {
	t.Helper()
	changes := make(chan change, 100)
	s, err := initiator.Open(t.Context(), initiator.Config{Address: "10.231.1.2:3260", TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", ISID: [6]byte{0x80, 9},
		FailoverTime: failover, OnState: func(st initiator.State, cause error) { changes <- change{st, cause, time.Now()} }})
	require.NoError(t, err)
	t.Cleanup(func() { s.Abort(context.Canceled); <-s.Done() })
	return s, changes
}

func next(t *testing.T, c chan change) change {
	t.Helper()
	select {
	case got := <-c:
		return got
	case <-time.After(30 * time.Second):
		t.Fatal("nothing happens")
		panic("")
	}
}

// failover_time is so long that only the event can be the reason.
func TestALinkThatGoesDownIsSuspectAtOnce(t *testing.T) {
	far, in := inside(t)
	if !in {
		return
	}
	for _, c := range []struct {
		name, why string
		down, up  []string
	}{
		{"carrier of an idle session", "no carrier", []string{"ip", "-n", far, "link", "set", "san1", "down"}, []string{"ip", "-n", far, "link", "set", "san1", "up"}},
		{"interface", "is down", []string{"ip", "link", "set", "san1", "down"}, []string{"ip", "link", "set", "san1", "up"}},
		{"route", "no route from 10.231.1.1 to 10.231.1.2", []string{"ip", "route", "del", "10.231.1.0/24", "dev", "san1"}, []string{"ip", "route", "add", "10.231.1.0/24", "dev", "san1", "src", "10.231.1.1"}},
		{"address", "was removed from this host", []string{"ip", "addr", "del", "10.231.1.1/24", "dev", "san1"}, []string{"ip", "addr", "add", "10.231.1.1/24", "dev", "san1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, changes := open(t, 20*time.Second)
			began := time.Now()
			run(t, c.down...)
			got := next(t, changes)
			require.Equal(t, initiator.Suspect, got.st)
			require.ErrorContains(t, got.cause, c.why)
			t.Logf("suspect after %v, the command that did it included", got.at.Sub(began))
			require.Less(t, got.at.Sub(began), 2*time.Second, "a tenth of failover_time")
			run(t, c.up...)
			require.Eventually(t, func() bool { // it serves again with the answer to the ping
				select {
				case got := <-changes:
					return got.st == initiator.Up
				default:
					return false
				}
			}, 15*time.Second, 10*time.Millisecond)
		})
	}
}

// A route that goes away while another one leads there too is asked about with a
// ping, no more.
func TestARouteBesideAnotherOneIsNotMissed(t *testing.T) {
	_, in := inside(t)
	if !in {
		return
	}
	run(t, "ip", "route", "add", "10.231.1.2/32", "dev", "san1", "src", "10.231.1.1")
	s, changes := open(t, 3*time.Second)
	run(t, "ip", "route", "del", "10.231.1.2/32", "dev", "san1")
	require.NoError(t, initiator.TestUnitReady(t.Context(), s, [8]byte{}))
	time.Sleep(time.Second) // more than three ticks
	require.Empty(t, changes)
	require.Equal(t, initiator.Up, s.State())
}

func TestALinkThatStaysDownIsDeadBeforeFailoverTime(t *testing.T) {
	far, in := inside(t)
	if !in {
		return
	}
	const failover = 10 * time.Second
	s, changes := open(t, failover)
	began := time.Now()
	run(t, "ip", "-n", far, "link", "set", "san1", "down")
	require.Equal(t, initiator.Suspect, next(t, changes).st)
	got := next(t, changes)
	require.Equal(t, initiator.Dead, got.st)
	require.ErrorContains(t, got.cause, "no carrier")
	t.Logf("dead after %v of %v", got.at.Sub(began), failover)
	require.Less(t, got.at.Sub(began), failover*7/10)
	<-s.Done()
}

// All packets are dropped: TCP_INFO tells before three ticks of silence.
func TestABlackholeIsSuspectByWhatIsSentAgain(t *testing.T) {
	far, in := inside(t)
	if !in {
		return
	}
	s, changes := open(t, 10*time.Second)
	require.NoError(t, initiator.TestUnitReady(t.Context(), s, [8]byte{}))
	run(t, "ip", "netns", "exec", far, "nft", "add table inet hole; add chain inet hole in { type filter hook input priority 0 ; policy drop ; }")
	go initiator.TestUnitReady(t.Context(), s, [8]byte{})
	began := time.Now()
	got := next(t, changes)
	require.Equal(t, initiator.Suspect, got.st)
	require.ErrorContains(t, got.cause, "acknowledges nothing")
	t.Logf("suspect after %v of 10s", got.at.Sub(began))
	require.Equal(t, initiator.Dead, next(t, changes).st)
}

// Nobody sends anything, and the other end goes: the ping of an idle session
// notices.
func TestAnIdleSessionNoticesThatItsTargetIsGone(t *testing.T) {
	far, in := inside(t)
	if !in {
		return
	}
	const failover = time.Second
	b, err := exec.Command("ip", "netns", "pids", far).Output()
	require.NoError(t, err)
	target := strings.Fields(string(b))
	require.Len(t, target, 1)
	for _, c := range []struct {
		name     string
		within   time.Duration
		down, up []string
	}{
		{"hangs", 5*failover + failover/2, []string{"kill", "-STOP", target[0]}, []string{"kill", "-CONT", target[0]}},
		{"blackhole", 5*failover + failover/2, []string{"ip", "netns", "exec", far, "nft", "add table inet hole; add chain inet hole in { type filter hook input priority 0 ; policy drop ; }"},
			[]string{"ip", "netns", "exec", far, "nft", "delete table inet hole"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, changes := open(t, failover)
			time.Sleep(failover * 3 / 2) // the ping that acknowledges the login is over
			began := time.Now()
			run(t, c.down...)
			defer run(t, c.up...)
			got := next(t, changes)
			for ; got.st != initiator.Dead; got = next(t, changes) {
			}
			t.Logf("dead after %v: %v", got.at.Sub(began), got.cause)
			require.Less(t, got.at.Sub(began), c.within)
		})
	}
}

// A map with two paths: I/O goes on through the other one long before
// failover_time is over.
func TestIOMovesWhenALinkGoesDown(t *testing.T) {
	far, in := inside(t)
	if !in {
		return
	}
	const failover = 10 * time.Second
	dir := t.TempDir()
	sock := filepath.Join(dir, "n")
	d, err := daemon.Start(daemon.Options{URLs: []string{"iscsi://10.231.1.2:3260/" + iqn + "/0", "iscsi://10.231.2.2:3260/" + iqn + "/0"}, InitiatorName: "iqn.2026-11.example:i",
		NBD: "unix:" + sock, Control: filepath.Join(dir, "c"), FailoverTime: failover, Policy: paths.Config{Alias: "l", NoPathRetry: paths.Queue}})
	require.NoError(t, err)
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		d.Stop(ctx)
	}()
	require.Eventually(t, func() bool { m := d.Snapshot().Maps; return len(m) == 1 && m[0].Paths.Usable == 2 }, 15*time.Second, 10*time.Millisecond)
	c, err := client.Dial("unix", sock, "l")
	require.NoError(t, err)
	defer c.Close()
	buf := make([]byte, 4096)
	dev := "san1"
	for _, g := range d.Snapshot().Maps[0].Groups {
		for _, p := range g.Paths {
			if p.Serving && strings.Contains(p.Portal, "10.231.2.2") {
				dev = "san2"
			}
		}
	}
	var longest time.Duration
	began := time.Now()
	for down := false; time.Since(began) < failover; {
		if !down && time.Since(began) > 500*time.Millisecond {
			run(t, "ip", "-n", far, "link", "set", dev, "down")
			down = true
		}
		at := time.Now()
		_, err := c.WriteAt(buf, 0)
		require.NoError(t, err)
		longest = max(longest, time.Since(at))
		time.Sleep(time.Millisecond)
	}
	t.Logf("longest write %v with failover_time %v", longest, failover)
	require.Less(t, longest, failover*7/10)
}
