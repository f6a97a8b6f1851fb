package daemon

import (
	"context"
	"fmt"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/kernel"
	"github.com/mpathd/mpathd/paths"
	"github.com/mpathd/mpathd/scsi"
)

// Inquire opens what answers questions about the units behind a PATH-URL: the
// device of a local one, else a session of our own with c. It is never the path
// itself. The caller calls end.
func Inquire(ctx context.Context, u initiator.URL, c initiator.Config) (d initiator.Doer, end func(), err error) {
	switch u.Transport {
	case initiator.Local:
		q, err := kernel.Inquire(ctx, u.Device)
		if err != nil {
			return nil, nil, err
		}
		return q, q.Close, nil
	case initiator.Kernel:
		if err := kernel.Available(); err != nil {
			return nil, nil, err
		}
	}
	s, err := initiator.Open(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	return s, func() { s.Close(ctx) }, nil
}

// LUN is the unit that u names, for those who ask with Inquire.
func LUN(u initiator.URL) [8]byte {
	return u.LUN // zero of a local one: the device is the unit
}

// wholeTarget tells whether u means all units of its target.
func wholeTarget(u initiator.URL) bool { return !u.HasLUN && u.Transport != initiator.Local }

// UnitName is what messages call the unit that u names.
func UnitName(u initiator.URL) string {
	if u.Transport == initiator.Local {
		return u.Device
	}
	return fmt.Sprintf("LUN %s of %s", scsi.LUNText(u.LUN), u.Target)
}

// pathConfig is the path to one unit of u, which info describes.
func (d *Daemon) pathConfig(u initiator.URL, order int, lun [8]byte, info *initiator.LUInfo) paths.PathConfig {
	pc := paths.PathConfig{Name: u.PathName(), URL: u.String(), Portal: u.Address, Target: u.Target, LUN: lun, LUNNumber: scsi.LUNNumber(lun), Order: order, Key: reservationKey(d.o.InitiatorName, u.PathName())}
	switch u.Transport {
	case initiator.Local:
		at := kernel.PlaceOf(u.Device)
		pc.Portal, pc.Target, pc.LUNNumber = at.Portal, at.Target, at.LUN
		if pc.Target == "" {
			pc.Target = scsi.TargetDevice(info.Designators)
		}
		if pc.Target == "" {
			pc.Target = u.Device
		}
		disk := kernel.NewDisk(u.Device)
		pc.Open = func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (paths.Session, error) {
			s, err := disk.Open(ctx, kernel.Options{FailoverTime: d.o.FailoverTime, QueueDepth: d.o.QueueDepth, OnState: onState, OnRoom: onRoom})
			if err != nil {
				return nil, err
			}
			return s, nil
		}
		return pc
	}
	login := kernel.NewISCSI(lun)
	pc.Open = func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (paths.Session, error) {
		c := d.sessionConfig(u, u.PathName())
		c.OnState, c.OnRoom = onState, onRoom
		if u.Transport == initiator.Kernel {
			s, err := login.Open(ctx, c)
			if err != nil {
				return nil, err
			}
			return s, nil
		}
		s, err := initiator.Open(ctx, c)
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	pc.Announced = u.Group
	pc.OpenAt = func(ctx context.Context, portal string) (paths.Session, error) { return d.openAt(ctx, u, portal) }
	return pc
}

// openAt logs in at another portal of u's target as if on u's own path.
func (d *Daemon) openAt(ctx context.Context, u initiator.URL, portal string) (paths.Session, error) {
	c := d.sessionConfig(u, u.PathName())
	c.Address, c.Home = portal, d.home(portal, u.Target)
	s, err := initiator.Open(ctx, c)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// leadsTo tells whether a path came from u.
func leadsTo(u initiator.URL, pc paths.PathConfig) bool {
	p, err := initiator.ParseURL(pc.URL)
	return err == nil && p.Transport == u.Transport && p.Device == u.Device && p.Address == u.Address && p.Target == u.Target && (!u.HasLUN || u.LUN == p.LUN)
}

// removeLeftovers ends the kernel sessions of runs that crashed. Those of the
// paths at risk are fenced like any other: by their next login.
func (d *Daemon) removeLeftovers() {
	n, err := kernel.RemoveLeftovers()
	if n > 0 {
		d.log.Warn("kernel sessions of an earlier run were left behind and are removed now", "sessions", n)
	}
	if err != nil {
		d.log.Error("kernel session of an earlier run cannot be removed", "cause", err)
	}
}
