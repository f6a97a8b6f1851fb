package daemon

import (
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/mpathd/mpathd/compat"
	"github.com/mpathd/mpathd/nbd"
	"github.com/mpathd/mpathd/paths"
)

// legacy lets those who know multipathd command the daemon.
type legacy struct{ d *Daemon }

// View is the state of all maps, with the places of kernel devices.
func (l legacy) View() compat.View {
	s := l.d.Snapshot()
	return l.viewOf(&s)
}

func (l legacy) viewOf(s *Maps) compat.View {
	v := compat.View{Maps: s.Maps}
	for i := range v.Maps {
		for j := range v.Maps[i].Groups {
			ps := v.Maps[i].Groups[j].Paths
			for k := range ps {
				device := ps[k].Device
				if device == "" && strings.HasPrefix(ps[k].Name, "/dev/") {
					device = ps[k].Name
				}
				if device != "" {
					ps[k].Place, ps[k].Number = deviceNumbers(device)
				}
			}
		}
	}
	for _, p := range s.Pending {
		v.Pending = append(v.Pending, compat.Pending{URL: p.URL, Cause: p.Cause})
	}
	return v
}

// deviceNumbers are the SCSI address and major:minor of a block device, as
// sysfs tells them.
func deviceNumbers(device string) (place, number string) {
	dir := filepath.Join("/sys/class/block", filepath.Base(device))
	if at, err := os.Readlink(filepath.Join(dir, "device")); err == nil && strings.Count(at, ":") == 3 {
		place = filepath.Base(at)
	}
	b, _ := os.ReadFile(filepath.Join(dir, "dev"))
	return place, strings.TrimSpace(string(b))
}

func (l legacy) Config(local bool) string {
	if l.d.o.ConfigText == nil {
		return ""
	}
	return l.d.o.ConfigText(local)
}

func (l legacy) Blacklist() string {
	if l.d.o.BlacklistText == nil {
		return compat.NoBlacklist
	}
	return l.d.o.BlacklistText()
}

func (l legacy) FailPath(name string) error { return l.d.FailPath(name) }

func (l legacy) ReinstatePath(name string) error { return l.d.ReinstatePath(name) }

func (l legacy) SwitchGroup(name string, n int) error {
	m, err := l.d.find(name)
	if err != nil {
		return err
	}
	return m.group.Switch(n)
}

func (l legacy) StopQueueing(name string) error {
	return l.onGroup(name, func(g *paths.Group) { g.SetQueueing(false) })
}

func (l legacy) RestoreQueueing(name string) error {
	return l.onGroup(name, (*paths.Group).RestoreQueueing)
}

func (l legacy) onGroup(name string, f func(*paths.Group)) error {
	m, err := l.d.find(name)
	if err != nil {
		return err
	}
	f(m.group)
	return nil
}

func (l legacy) Resize(name string) error {
	if err := l.d.Resize(name, false); !errors.Is(err, paths.ErrSameSize) {
		return err
	}
	return nil
}

func (l legacy) Reconfigure() error { return l.d.Reconfigure() }

func (l legacy) Shutdown() error { return syscall.Kill(os.Getpid(), syscall.SIGTERM) }

// serveCompat answers POST /compat: cmd is a command of multipathd.
func (d *Daemon) serveCompat(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Write([]byte(compat.Run(legacy{d}, r.FormValue("cmd"))))
}

// listenCompat opens the socket of the peer's clients: PATH, or @NAME in the
// abstract namespace. Anybody may connect: the server minds who may do what.
func listenCompat(spec string) (net.Listener, error) {
	if strings.HasPrefix(spec, "@") {
		return net.Listen("unix", spec)
	}
	return listen(nbd.Listener{Network: "unix", Address: spec, Mode: 0o666})
}

// startCompat serves it.
func (d *Daemon) startCompat(ln net.Listener) {
	s := &compat.Server{Log: d.log, Run: func(cmd string) string { return compat.Run(legacy{d}, cmd) }}
	d.wg.Go(func() { s.Serve(ln) })
	d.wg.Go(func() {
		<-d.ctx.Done()
		ln.Close()
		s.Close()
	})
	d.log.Info("serving multipathd's clients", "socket", d.o.CompatSocket)
}
