package main

import (
	"fmt"
	"strings"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/nbd"
	"github.com/mpathd/mpathd/nbd/attach"
)

// attacher reads --attach: auto takes any free device where the kernel has
// NBD, none takes nothing, /dev/nbdX is for the first map.
func attacher(spec string) (daemon.Attacher, error) {
	switch {
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
		backend := attach.BackendPrefix + wwid
		make, old := attach.Connect, attach.Find(backend)
		if old != "" {
			// An earlier run died or left, and its users still wait on this device.
			make, device = attach.Adopt, old
		}
		if old != "" {
			if f := d.Inherit(old); f != nil {
				dev, err := attach.Inherit(old, backend)
				if err != nil {
					f.Close()
					return daemon.Kernel{}, err
				}
				go d.Server().ServeHanded(f, export)
				return kernelOf(dev, export, true), nil
			}
		}
		if device == "" {
			device, first = first, "" // daemon attaches one map at a time
		}
		kernel, conn, err := sys.SocketPair()
		if err != nil {
			return daemon.Kernel{}, err
		}
		defer kernel.Close()
		go d.Server().ServeTransmission(conn, export)
		dev, err := make(attach.Options{Device: device, Size: g.Size, BlockSize: g.BlockSize, Flags: nbd.Flags(g), Backend: backend, Socket: kernel})
		if err != nil {
			conn.Close()
			return daemon.Kernel{}, err
		}
		return kernelOf(dev, export, old != ""), nil
	}, nil
}

func kernelOf(dev *attach.Device, export string, adopted bool) daemon.Kernel {
	unlink, err := dev.Link(export)
	if err != nil {
		logger().Warn("no link to the device", "cause", err)
		unlink = func() {}
	}
	detach := func() error { unlink(); return dev.Disconnect() }
	return daemon.Kernel{Path: dev.Path(), Detach: detach, Resize: dev.Resize, Adopted: adopted, InUse: dev.InUse}
}
