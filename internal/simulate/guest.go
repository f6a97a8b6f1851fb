package simulate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// guest uses the disk over NBD. When its connection ends it connects again and
// sends what was not answered anew, as the kernel's client does.
type guest struct {
	w    *world
	mu   sync.Mutex
	cond sync.Cond
	cl   *client.Client
	away bool // stop connecting
	gen  int
	busy int
	open map[*request]bool // those not answered
	tick int64
	next uint16 // the last value written
	err  error
	h    history
	wg   sync.WaitGroup
}

// request is one request of the guest, in whole blocks.
type request struct {
	op     block.Op
	at, n  int
	fua    bool
	value  uint16
	call   int64
	seenAt []uint16 // what a read saw
	id     int
}

func newGuest(w *world) *guest {
	g := &guest{w: w, h: newHistory(w.set.Blocks), open: map[*request]bool{}}
	g.cond.L = &g.mu
	g.h.shadow = w.set.Protection == paths.Shadow
	return g
}

// routineConnect keeps the guest connected to whatever process there is.
func (g *guest) routineConnect() {
	defer g.wg.Done()
	for {
		g.mu.Lock()
		for g.cl != nil && !g.away {
			g.cond.Wait()
		}
		away := g.away
		g.mu.Unlock()
		if away {
			return
		}
		if cl, err := client.Open(g.process().connect(), exportName); err == nil {
			g.mu.Lock()
			g.cl = cl
			g.gen++
			g.cond.Broadcast()
			g.mu.Unlock()
			continue
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (g *guest) process() *process {
	g.w.state.mu.Lock()
	defer g.w.state.mu.Unlock()
	return g.w.proc
}

// submit starts a request if there is room.
func (g *guest) submit(r *request) {
	g.mu.Lock()
	if g.busy >= g.w.set.Depth {
		g.mu.Unlock()
		return
	}
	g.busy++
	g.tick++
	r.call = g.tick
	r.id = int(g.tick)
	if r.op == block.Write {
		g.next++
		r.value = g.next
	}
	g.open[r] = true
	g.mu.Unlock()
	g.wg.Go(func() { g.do(r) })
}

func (g *guest) do(r *request) {
	for {
		g.mu.Lock()
		for g.cl == nil && !g.away {
			g.cond.Wait()
		}
		cl, gen := g.cl, g.gen
		if g.away {
			g.mu.Unlock()
			return
		}
		g.mu.Unlock()
		err := g.once(cl, r)
		if err == nil || strings.HasPrefix(err.Error(), "NBD error") {
			g.done(r, err)
			return
		}
		g.lost(cl, gen, err)
	}
}

// once sends a request on one connection.
func (g *guest) once(cl *client.Client, r *request) error {
	off, n := int64(r.at)*blockSize, r.n*blockSize
	switch r.op {
	case block.Read:
		b := make([]byte, n)
		if _, err := cl.ReadAt(b, off); err != nil {
			return err
		}
		r.seenAt = r.seenAt[:0]
		for i := range r.n {
			v, ok := value(b[i*blockSize : (i+1)*blockSize])
			if !ok {
				g.fail(fmt.Errorf("read of block %d: torn", r.at+i))
			}
			r.seenAt = append(r.seenAt, v)
		}
		return nil
	case block.Write:
		var err error
		if b := fill(r.n, r.value); r.fua {
			_, err = cl.WriteFUA(b, off)
		} else {
			_, err = cl.WriteAt(b, off)
		}
		return err
	case block.WriteZeroes:
		return cl.WriteZeroes(off, uint32(n))
	case block.Trim:
		return cl.Trim(off, uint32(n))
	}
	return cl.Flush()
}

// lost takes a connection that ended out of use.
func (g *guest) lost(cl *client.Client, gen int, _ error) {
	cl.Close()
	g.mu.Lock()
	if g.gen == gen && g.cl == cl {
		g.cl = nil
		g.cond.Broadcast()
	}
	g.mu.Unlock()
}

// drop breaks the connection.
func (g *guest) drop() {
	g.mu.Lock()
	cl, gen := g.cl, g.gen
	g.mu.Unlock()
	if cl != nil {
		g.lost(cl, gen, errors.New("dropped by the script"))
	}
}

func (g *guest) fail(err error) {
	g.mu.Lock()
	if g.err == nil {
		g.err = err
	}
	g.mu.Unlock()
}

// done books an answered request.
func (g *guest) done(r *request, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy--
	delete(g.open, r)
	g.tick++
	if err != nil && r.op == block.Flush && g.h.told > 0 {
		g.h.failed++
		g.h.flush(porcupine.Operation{ClientId: r.id, Call: r.call, Return: g.tick}, actFlushFailed)
		g.w.nudge()
		return
	}
	if err != nil {
		if g.err == nil { // every path comes back, and no medium is bad
			g.err = fmt.Errorf("%v of blocks %d to %d: %w", r.op, r.at, r.at+r.n, err)
		}
		return
	}
	g.h.add(r, g.tick)
	g.w.nudge()
}

// other is a write of another host, which keeps to what a cluster's locks demand:
// it writes no block of which the guest has a request that is not answered. It
// goes past the caches.
func (g *guest) other(at int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for r := range g.open {
		if r.op != block.Read && r.op != block.Flush && r.at <= at && at < r.at+r.n {
			return
		}
	}
	for _, s := range g.w.srv {
		if s.running && !s.hung {
			g.next++
			g.tick += 2
			g.w.disk.write(s, at, fill(1, g.next), true)
			g.h.add(&request{op: block.Write, at: at, n: 1, fua: true, value: g.next, call: g.tick - 1, id: int(g.tick)}, g.tick)
			return
		}
	}
}

// power books a power cut.
func (g *guest) power(two, told bool) {
	g.mu.Lock()
	g.tick += 2
	g.h.power(g.tick-1, g.tick, two, told)
	g.mu.Unlock()
}

// tells books reports of power cuts that are on their way to the host: one that
// does not arrive is not made again, and then nobody can know.
func (g *guest) tells(n int) {
	g.mu.Lock()
	g.h.untold += n
	g.mu.Unlock()
}

func (g *guest) idle() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.busy == 0
}

// leave ends the guest.
func (g *guest) leave(ctx context.Context) {
	g.mu.Lock()
	g.away = true
	cl := g.cl
	g.cl = nil
	g.cond.Broadcast()
	g.mu.Unlock()
	if cl != nil {
		cl.Close()
	}
}

// waiting names what is not answered.
func (g *guest) waiting() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.busy == 0 {
		return nil
	}
	return fmt.Errorf("%d requests of the guest are not answered", g.busy)
}

// read books what is found on the disk without the product's help.
func (g *guest) read(disk []byte) {
	r := &request{op: block.Read, n: g.w.set.Blocks}
	for i := range r.n {
		v, _ := value(disk[i*blockSize : (i+1)*blockSize])
		r.seenAt = append(r.seenAt, v)
	}
	g.mu.Lock()
	g.tick += 2
	r.call = g.tick - 1
	g.h.add(r, g.tick)
	g.mu.Unlock()
}
