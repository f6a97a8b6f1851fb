package realtarget

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd"
	"github.com/mpathd/mpathd/nbd/attach"
)

// slowDisk is a block device of the kernel whose data are in this process, so
// that one write can be made to last while others overtake it.
type slowDisk struct {
	path string
	slow atomic.Bool // the next write takes two seconds

	mu   sync.Mutex
	data []byte
}

func newSlowDisk(t testing.TB, size int64) *slowDisk {
	t.Helper()
	d := &slowDisk{data: make([]byte, size)}
	server := nbd.NewServer(nbd.Config{})
	if err := server.AddExport(nbd.Export{Name: "disk", Device: d}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	serve := func(c net.Conn) error {
		defer close(ended)
		server.ServeTransmission(c, "disk")
		return nil
	}
	dev, err := attach.Connect(attach.Options{Size: size, BlockSize: 512, Flags: nbd.Flags(d.Geometry()), Backend: "slowdisk", Serve: serve})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Disconnect(); err != nil {
			t.Errorf("detaching %s: %v", dev.Path(), err)
		}
		<-ended
	})
	d.path = dev.Path()
	return d
}

// Geometry is that of a disk without a cache.
func (d *slowDisk) Geometry() block.Geometry {
	return block.Geometry{Size: int64(len(d.data)), BlockSize: 512, PhysicalBlock: 512, Trim: true}
}

// Submit serves r; a slow write has its effect at its end.
func (d *slowDisk) Submit(r *block.Request, p *block.Plug) {
	if r.Op == block.Write && d.slow.CompareAndSwap(true, false) {
		time.AfterFunc(2*time.Second, func() {
			var late block.Plug
			d.serve(r, &late)
			late.Flush()
		})
		return
	}
	d.serve(r, p)
}

func (d *slowDisk) serve(r *block.Request, p *block.Plug) {
	d.mu.Lock()
	switch r.Op {
	case block.Read:
		copy(r.Data, d.data[r.Off:r.Off+r.Len])
	case block.Write:
		copy(d.data[r.Off:], r.Data)
	case block.Trim, block.WriteZeroes:
		clear(d.data[r.Off : r.Off+r.Len])
	}
	d.mu.Unlock()
	r.Owner.Complete(r, p)
}
