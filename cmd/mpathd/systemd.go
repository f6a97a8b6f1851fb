package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	sd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/mpathd/mpathd/daemon"
)

// What `mpathd run` does under systemd (sd_notify(3), sd_watchdog_enabled(3),
// "File Descriptor Store" of systemd.service(5)). Elsewhere all of it does nothing.

// readyTime bounds how long the units that wait for mpathd wait for paths that
// do not answer: with these the boot goes on without them.
const readyTime = 10 * time.Second

// notifyReady says READY when every URL has led somewhere, or readyTime is over.
func notifyReady(d *daemon.Daemon) {
	for end := time.Now().Add(readyTime); time.Now().Before(end) && len(d.Snapshot().Pending) > 0; {
		select {
		case <-d.Done():
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
	s := d.Snapshot()
	sd.SdNotify(false, fmt.Sprintf("%s\nSTATUS=%d maps, %d paths pending", sd.SdNotifyReady, len(s.Maps), len(s.Pending)))
}

// feedWatchdog tells systemd that we live, as long as hangs returns, with nothing:
// a deadlock, or a data path that stands still, ends in a restart, which the
// kernel devices outlive.
func feedWatchdog(done <-chan struct{}, hangs func() []string, log *slog.Logger) {
	every, err := sd.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return
	}
	for {
		select {
		case <-done:
			return
		case <-time.After(every / 3):
			if maps := hangs(); len(maps) > 0 {
				log.Error("the data path stands still: no keep-alive for the watchdog", "maps", maps)
				continue
			}
			sd.SdNotify(false, sd.SdNotifyWatchdog)
		}
	}
}

// storePrefix begins the names of our descriptors in systemd's store; the
// device's name follows.
const storePrefix = "mpathd-"

// inheritedFromStore takes the sockets that the run before left in systemd's
// store, and takes them out of there: after a crash of this run they would be
// worth nothing.
func inheritedFromStore() (in []daemon.Inherited) {
	for name, files := range activation.FilesWithNames() {
		device, ours := strings.CutPrefix(name, storePrefix)
		for _, f := range files {
			if !ours {
				f.Close()
				continue
			}
			in = append(in, daemon.Inherited{Device: "/dev/" + device, File: f})
		}
		sd.SdNotify(false, "FDSTOREREMOVE=1\nFDNAME="+name)
	}
	return in
}

// storeDevices leaves the sockets of the kernel devices with systemd for the
// next run, if there is a store.
func storeDevices(ctx context.Context, d *daemon.Daemon, log *slog.Logger) {
	to := os.Getenv("NOTIFY_SOCKET")
	if to == "" {
		return
	}
	hs, err := d.HandOver(ctx)
	if err != nil {
		log.Warn("not all devices could be handed over, the kernel sends their requests anew", "cause", err)
	}
	for _, h := range hs {
		msg := fmt.Sprintf("FDSTORE=1\nFDNAME=%s%s\nFDPOLL=0", storePrefix, filepath.Base(h.Device))
		if err := notifyWith(to, msg, h.File); err != nil {
			log.Warn("device not left with systemd, the kernel sends its requests anew", "device", h.Device, "cause", err)
		}
		h.File.Close()
	}
	// The messages are read in order: when this one is answered, so are those before it.
	barrier(to)
}

// notifyWith sends a message with a descriptor to systemd (sd_pid_notify_with_fds(3)).
func notifyWith(socket, msg string, f *os.File) error {
	s, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer syscall.Close(s)
	err = syscall.Sendmsg(s, []byte(msg), syscall.UnixRights(int(f.Fd())), &syscall.SockaddrUnix{Name: socket}, 0)
	return os.NewSyscallError("sendmsg", err)
}

// barrier waits until systemd has read everything sent before (sd_notify_barrier(3)).
func barrier(socket string) {
	r, w, err := os.Pipe()
	if err != nil {
		return
	}
	defer r.Close()
	err = notifyWith(socket, "BARRIER=1", w)
	w.Close()
	if err == nil {
		r.SetReadDeadline(time.Now().Add(2 * time.Second))
		r.Read(make([]byte, 1))
	}
}
