package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// A planned upgrade: this run answers what is in flight, logs out and gives the
// kernel's sockets to the next one, which goes on reading from them. Nothing
// is sent twice and no timer of the kernel is involved.

// Inherited is a socket of a kernel device that an earlier run gave away between
// two requests. A device with several connections has one for each.
type Inherited struct {
	Device string   // /dev/nbdX
	File   *os.File // owned by whoever holds the value
}

// handoverDrain bounds the wait for requests in flight: what waits for a path
// can wait for longer than anybody would for an upgrade.
const handoverDrain = 5 * time.Second

// HandOver stops serving the kernel's devices and returns their sockets. What
// could not be handed over is in the error, and in the kernel's hands: the next
// run takes it over as after a crash. Leave must follow.
func (d *Daemon) HandOver(ctx context.Context) ([]Inherited, error) {
	ctx, cancel := context.WithTimeout(ctx, handoverDrain)
	defer cancel()
	hs, err := d.server.HandOver(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []Inherited
	for _, h := range hs {
		device := ""
		for _, m := range d.maps {
			if m.alias == h.Export {
				device = m.kernel.Path
			}
		}
		if device == "" {
			h.File.Close()
			err = errors.Join(err, fmt.Errorf("the device of %s is not known yet", h.Export))
			continue
		}
		out = append(out, Inherited{device, h.File})
	}
	return out, err
}

// DetachIdle detaches the kernel devices that nobody uses and returns the
// others.
func (d *Daemon) DetachIdle() (used []string) {
	d.mu.Lock()
	maps := slices.Clone(d.maps)
	d.mu.Unlock()
	return d.detachIdle(maps)
}

func (d *Daemon) detachIdle(maps []*mapEntry) (used []string) {
	for _, m := range maps {
		d.mu.Lock()
		k := m.kernel
		d.mu.Unlock()
		if k.Detach == nil {
			continue
		}
		if k.InUse != nil {
			if who := k.InUse(); who != "" {
				d.log.Warn("device left to the next run, its I/O waits until then", "map", m.alias, "device", k.Path, "because", who)
				used = append(used, k.Path)
				continue
			}
		}
		d.detached(m, k)
	}
	return used
}

func (d *Daemon) detached(m *mapEntry, k Kernel) error {
	err := k.Detach()
	if err != nil {
		d.log.Warn("detach failed", "device", k.Path, "cause", err)
		return err
	}
	d.mu.Lock()
	m.kernel = Kernel{}
	d.mu.Unlock()
	d.log.Info("detached", "map", m.alias, "device", k.Path)
	return nil
}

// Detach takes a map's kernel device away, one in use only if forced: its users
// then get I/O errors.
func (d *Daemon) Detach(name string, force bool) error {
	m, err := d.find(name)
	if err != nil {
		return err
	}
	d.mu.Lock()
	k := m.kernel
	d.mu.Unlock()
	if k.Detach == nil {
		return fmt.Errorf("map %s has no kernel device", m.alias)
	}
	if k.InUse != nil && !force {
		if who := k.InUse(); who != "" {
			return fmt.Errorf("%s: %s: end that first, or use --force, which gives it I/O errors", k.Path, who)
		}
	}
	return d.detached(m, k)
}

// Context ends when the daemon stops.
func (d *Daemon) Context() context.Context { return d.ctx }

// Done is closed when the daemon stops.
func (d *Daemon) Done() <-chan struct{} { return d.ctx.Done() }

// Leaving is closed when another process asked to take over: the owner of d
// calls Leave and ends.
func (d *Daemon) Leaving() <-chan struct{} { return d.leaving }

// serveHandover answers POST /handover: the sockets go to the unix socket that
// the next run listens on.
func (d *Daemon) serveHandover(r *http.Request) error {
	to := r.FormValue("socket")
	if filepath.Dir(to) != filepath.Dir(d.o.Control) { // a directory of root's own, like ours
		return fmt.Errorf("handover: socket %q is not beside the control socket", to)
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: to, Net: "unix"})
	if err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	d.mu.Lock()
	if d.successor != nil {
		d.mu.Unlock()
		c.Close()
		return errors.New("handover: another process takes over already")
	}
	d.successor = c // stays open until this process has ended
	d.mu.Unlock()
	hs, err := d.HandOver(r.Context())
	if err != nil {
		d.log.Warn("not all devices could be handed over, the kernel sends their requests anew", "cause", err)
	}
	devices, err := sendDevices(c, hs)
	for _, h := range hs {
		h.File.Close()
	}
	close(d.leaving) // even if nobody took them: the kernel reconnects to whoever is next
	if err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	d.log.Info("handed over to the next run", "devices", devices)
	return nil
}

// maxHanded bounds the sockets of one message of a handover, as the kernel does
// (SCM_MAX_FD).
const maxHanded = 253

// sendDevices writes the messages of a handover, one if there is nothing to give.
func sendDevices(c *net.UnixConn, hs []Inherited) (all []string, err error) {
	for {
		n := min(len(hs), maxHanded)
		var devices []string
		var fds []int
		for _, h := range hs[:n] {
			devices = append(devices, h.Device)
			fds = append(fds, int(h.File.Fd()))
		}
		b, _ := json.Marshal(devices)
		if _, _, err := c.WriteMsgUnix(append(b, '\n'), syscall.UnixRights(fds...), nil); err != nil {
			return all, err
		}
		all = append(all, devices...)
		if hs = hs[n:]; len(hs) == 0 {
			return all, nil
		}
	}
}

var errRefuses = errors.New("the running daemon refuses")

// TakeOver asks the daemon behind a control socket for its kernel devices and
// waits until it has ended. Without a daemon there it returns nothing, and if that
// one dies meanwhile, what it had given.
func TakeOver(ctx context.Context, control string) ([]Inherited, error) {
	if c, err := net.Dial("unix", control); err != nil {
		return nil, nil
	} else {
		c.Close()
	}
	at := filepath.Join(filepath.Dir(control), fmt.Sprintf(".takeover-%d", os.Getpid()))
	os.Remove(at)
	old := syscall.Umask(0o177)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: at, Net: "unix"})
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("takeover: %w", err)
	}
	defer ln.Close()
	asked := make(chan error, 1)
	go func() {
		client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", control)
		}}}
		rq, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://mpathd/handover?"+url.Values{"socket": {at}}.Encode(), nil)
		if err == nil {
			var rs *http.Response
			if rs, err = client.Do(rq); err == nil {
				rs.Body.Close()
				if rs.StatusCode != http.StatusOK {
					err = fmt.Errorf("%w (%s): is it older than this one? Stop it with SIGUSR2, then start", errRefuses, rs.Status)
				}
			}
		}
		asked <- err
		if err != nil {
			ln.Close()
		}
	}()
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(handoverDrain + 10*time.Second)
	}
	ln.SetDeadline(deadline)
	var in []Inherited
	c, err := ln.AcceptUnix()
	if err == nil {
		c.SetDeadline(deadline)
		in, err = receiveAll(c)
		c.Close()
	}
	if err == nil {
		return in, nil
	}
	select {
	case e := <-asked:
		if e != nil {
			err = e
		}
	case <-time.After(endTime):
	}
	if errors.Is(err, errRefuses) || !ended(control) {
		return nil, fmt.Errorf("takeover: %w", err)
	}
	return nil, nil
}

// endTime is how long a process that dies may still be seen.
const endTime = time.Second

// ended tells whether no daemon is behind a control socket any more.
func ended(control string) bool {
	for end := time.Now().Add(endTime); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", control)
		if err != nil {
			return true
		}
		c.Close()
	}
	return false
}

// receiveAll reads the messages of a handover until the old process has ended: it
// holds the other end. Without one whole message it is an error.
func receiveAll(c *net.UnixConn) (in []Inherited, err error) {
	for messages := 0; ; messages++ {
		more, err := receiveDevices(c)
		if err != nil && messages == 0 {
			return nil, err
		} else if err != nil {
			return in, nil
		}
		in = append(in, more...)
	}
}

// receiveDevices reads one message of a handover.
func receiveDevices(c *net.UnixConn) ([]Inherited, error) {
	b, oob := make([]byte, 64<<10), make([]byte, syscall.CmsgSpace(4*maxHanded))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	if ms, err := syscall.ParseSocketControlMessage(oob[:oobn]); err == nil {
		for _, m := range ms {
			if got, err := syscall.ParseUnixRights(&m); err == nil {
				fds = append(fds, got...)
			}
		}
	}
	var files []*os.File
	for _, fd := range fds {
		syscall.CloseOnExec(fd)
		files = append(files, os.NewFile(uintptr(fd), "nbd"))
	}
	var devices []string
	if err = json.Unmarshal(b[:n], &devices); err == nil && len(devices) != len(files) {
		err = fmt.Errorf("%d devices with %d sockets", len(devices), len(files))
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	out := make([]Inherited, len(files))
	for i := range files {
		out[i] = Inherited{devices[i], files[i]}
	}
	return out, nil
}

// Inherit takes the sockets that an earlier run left for a kernel device, one for
// each of its connections that could be handed over.
func (d *Daemon) Inherit(device string) (fs []*os.File) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, in := range d.o.Inherited {
		if in.Device == device && in.File != nil {
			d.o.Inherited[i].File = nil
			fs = append(fs, in.File)
		}
	}
	return fs
}
