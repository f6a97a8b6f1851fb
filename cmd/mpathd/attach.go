package main

import (
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/nbd"
	"github.com/mpathd/mpathd/nbd/attach"
)

// attacher reads --attach: auto takes any free device where the kernel has
// NBD, none takes nothing, /dev/nbdX is for the first map. New devices get that
// many connections. Those that are pinned to a map are for no other.
func attacher(spec string, connections int, pinned func() []string) (daemon.Attacher, error) {
	switch {
	case connections < 1 || connections > attach.MaxConnections:
		return nil, usageError{fmt.Errorf("--attach-connections %d: want 1 to %d", connections, attach.MaxConnections)}
	case spec == "none":
		return nil, nil
	case spec != "auto" && !strings.HasPrefix(spec, "/dev/nbd"):
		return nil, usageError{fmt.Errorf("--attach %q: want auto, none or /dev/nbdX", spec)}
	}
	if err := attach.Available(); err != nil {
		if spec == "auto" {
			logger().Warn("no kernel device, the NBD socket serves all the same", "cause", err)
			return nil, nil
		}
		return nil, err
	}
	first := strings.TrimPrefix(spec, "auto")
	return func(d *daemon.Daemon, export, wwid, device string, g block.Geometry) (daemon.Kernel, error) {
		o := attach.Options{Device: device, Size: g.Size, BlockSize: g.BlockSize, Flags: nbd.Flags(g), Backend: attach.BackendPrefix + wwid, Connections: connections,
			Serve: func(c net.Conn) error { return d.Server().ServeTransmission(c, export) }, Ctx: d.Context(), Logger: logger()}
		if old := attach.Find(o.Backend); old != "" {
			// An earlier run died or left, and its users still wait on this device.
			o.Device = old
			dev, err := attach.Adopt(o, d.Inherit(old)...)
			if err != nil {
				return daemon.Kernel{}, err
			}
			return kernelOf(dev, export, dev.Size(), true), nil
		}
		if o.Device == "" {
			if o.Others = pinned(); !slices.Contains(o.Others, first) {
				o.Device, first = first, "" // daemon attaches one map at a time
			}
		}
		dev, err := attach.Connect(o)
		if err != nil {
			return daemon.Kernel{}, err
		}
		return kernelOf(dev, export, g.Size, false), nil
	}, nil
}

// attached is the size of the device that an earlier run made for a unit, or 0.
func attached(wwid string) int64 {
	dev, err := attach.Open(attach.Find(attach.BackendPrefix + wwid))
	if err != nil {
		return 0
	}
	return dev.Size()
}

func kernelOf(dev *attach.Device, export string, size int64, adopted bool) daemon.Kernel {
	unlink, err := dev.Link(export)
	if err != nil {
		logger().Warn("no link to the device", "cause", err)
		unlink = func() {}
	}
	detach := func() error { unlink(); return dev.Disconnect() }
	return daemon.Kernel{Path: dev.Path(), Detach: detach, Size: size, Resize: dev.Resize, Adopted: adopted, InUse: dev.InUse}
}

// tellUnserved says which devices an earlier run has left that this one, as it is
// configured now, has not taken over.
func tellUnserved(done <-chan struct{}, log *slog.Logger) {
	select {
	case <-done:
		return
	case <-time.After(readyTime):
	}
	for _, dev := range attach.Unserved() {
		log.Warn("nobody serves the device of an earlier run, its I/O waits", "device", dev.Path(), "wwid", dev.WWID(),
			"do", "configure its target, or `mpathd detach "+dev.Path()+"`")
	}
}
