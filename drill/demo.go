package drill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// fault is one thing that happens to the serving path.
type fault struct {
	name        string
	cut, mend   func(i int) // of the target that serves
	longest     time.Duration
	errs, wrong int64
	back        time.Duration
}

const (
	faultTime  = 3 * time.Second
	returnTime = 10 * time.Second
)

// Demo runs two built-in targets with one disk, a map over both, and verified
// load through an NBD socket, breaks the serving path in three ways, and
// reports to w. An error means that something was lost or did not come back.
func Demo(ctx context.Context, w io.Writer) error {
	dir, err := os.MkdirTemp("", "mpathd-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	lu, err := target.NewLU(256<<20, 512, target.DefaultIdentity("demo"))
	if err != nil {
		return err
	}
	var servers []*target.Server
	var proxies []*faultnet.Proxy
	var urls []string
	for _, name := range []string{"iqn.2026-11.org.mpathd:demo.a", "iqn.2026-11.org.mpathd:demo.b"} {
		srv, err := target.New(target.Config{Targets: []*target.Target{{Name: name, LUs: []*target.LU{lu}}}})
		if err != nil {
			return err
		}
		defer srv.Kill()
		portal, err := srv.Listen("127.0.0.1:0")
		if err != nil {
			return err
		}
		proxy, err := faultnet.New("127.0.0.1:0", portal.Addr())
		if err != nil {
			return err
		}
		defer proxy.Close()
		servers, proxies = append(servers, srv), append(proxies, proxy)
		urls = append(urls, "iscsi://"+proxy.Addr()+"/"+name+"/0")
	}
	sock := filepath.Join(dir, "nbd.sock")
	d, err := daemon.Start(daemon.Options{URLs: urls, InitiatorName: "iqn.2026-11.org.mpathd:demo", NBD: "unix:" + sock,
		Control: filepath.Join(dir, "control.sock"), FailoverTime: time.Second, Logger: slog.New(slog.DiscardHandler),
		Policy: paths.Config{Alias: "demo", NoPathRetry: paths.Queue}})
	if err != nil {
		return err
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		d.Stop(stop)
	}()
	if !eventually(returnTime, func() bool { return usable(d) == 2 }) {
		return errors.New("demo: the two paths did not come up")
	}
	c, err := client.Dial("unix", sock, "demo")
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Fprintf(w, "one disk behind two targets, exported at %s; writing and verifying\n", sock)
	load := Start(c, 192<<20)
	time.Sleep(time.Second)
	faults := []*fault{
		{name: "reset", cut: func(i int) { proxies[i].Refuse(); proxies[i].Reset() }, mend: func(i int) { proxies[i].Heal() }},
		{name: "blackhole", cut: func(i int) { proxies[i].Blackhole() }, mend: func(i int) { proxies[i].Heal() }},
		{name: "hung target", cut: func(i int) { servers[i].Hang() }, mend: func(i int) { servers[i].Resume() }},
	}
	var lost error
	for _, f := range faults {
		load.Mark()
		i, path := serving(d, proxies)
		f.cut(i)
		fmt.Fprintf(w, "%-12s on the serving path %s\n", f.name, path)
		live(ctx, w, d, load, faultTime)
		f.mend(i)
		mended := time.Now()
		if eventually(returnTime, func() bool { return usable(d) == 2 }) {
			f.back = time.Since(mended)
		} else {
			lost = errors.Join(lost, fmt.Errorf("%s: the path did not come back in %v", f.name, returnTime))
		}
		live(ctx, w, d, load, time.Second)
		f.longest, f.errs, f.wrong = load.Mark()
		if f.longest > faultTime*9/10 { // loosely: a slow machine is no failure
			lost = errors.Join(lost, fmt.Errorf("%s: an I/O took %v: it waited for the path to come back", f.name, f.longest))
		}
	}
	verdict := load.Stop(lu.ReadAt)
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "\nfault\tlongest I/O\terrors\tmismatches\tpath back after")
	var errs, wrong int64
	for _, f := range faults {
		fmt.Fprintf(tw, "%s\t%v\t%d\t%d\t%v\n", f.name, f.longest.Round(time.Millisecond), f.errs-errs, f.wrong-wrong, f.back.Round(time.Millisecond))
		errs, wrong = f.errs, f.wrong
	}
	tw.Flush()
	if err := errors.Join(lost, verdict); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	fmt.Fprintf(w, "\n%d I/Os, every block verified on the disk itself: nothing was lost\n", load.IOs())
	return nil
}

// serving finds the path that carries the load.
func serving(d *daemon.Daemon, proxies []*faultnet.Proxy) (int, string) {
	for _, m := range d.Snapshot().Maps {
		for _, g := range m.Groups {
			for _, p := range g.Paths {
				for i := range proxies {
					if p.Serving && p.Portal == proxies[i].Addr() {
						return i, p.Name
					}
				}
			}
		}
	}
	return 0, "?"
}

func usable(d *daemon.Daemon) int {
	n := 0
	for _, m := range d.Snapshot().Maps {
		n += m.Paths.Usable
	}
	return n
}

func eventually(limit time.Duration, ok func() bool) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return true
		}
	}
	return ok()
}

// live shows what happens: one line that is rewritten on a terminal.
func live(ctx context.Context, w io.Writer, d *daemon.Daemon, l *Load, long time.Duration) {
	f, ok := w.(*os.File)
	tty := false
	if ok {
		if st, err := f.Stat(); err == nil {
			tty = st.Mode()&os.ModeCharDevice != 0
		}
	}
	const step = 250 * time.Millisecond
	before := l.IOs()
	for end := time.Now().Add(long); time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(step)
		if n := l.IOs(); tty {
			fmt.Fprintf(w, "\r%7d I/Os per second, %d of 2 paths usable, %d errors \x1b[K", (n-before)*int64(time.Second/step), usable(d), l.errors.Load())
			before = n
		}
	}
	if tty {
		fmt.Fprint(w, "\r\x1b[K")
	}
}
