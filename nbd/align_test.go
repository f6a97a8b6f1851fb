package nbd

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/nbd/proto"
)

// late is a disk that executes and completes each request a moment later, out
// of order.
type late struct{ ram }

func (d *late) Submit(r *block.Request, p *block.Plug) {
	go func() {
		time.Sleep(time.Duration(rand.N(300)) * time.Microsecond)
		d.mu.Lock()
		d.run(r)
		d.mu.Unlock()
		time.Sleep(time.Duration(rand.N(300)) * time.Microsecond)
		var p block.Plug
		r.Owner.Complete(r, &p)
		p.Flush()
	}()
}

func TestPartsOfBlocksAreServed(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	d.mu.Lock()
	for i := range d.data[:8192] {
		d.data[i] = byte(i)
	}
	d.mu.Unlock()
	want := d.bytes(0, 8192)
	p := dial().enter()
	for _, c := range []struct{ off, n int }{{1, 1}, {511, 2}, {100, 3000}, {512, 100}, {0, 513}, {1000, 24}} {
		p.ask(proto.CmdRead, 0, 1, uint64(c.off), uint32(c.n), nil)
		e, _ := p.answer()
		require.Equal(t, proto.OK, e)
		require.Equal(t, want[c.off:c.off+c.n], p.get(c.n), "%+v", c)

		data := bytes.Repeat([]byte{byte(c.off)}, c.n)
		copy(want[c.off:], data)
		p.ask(proto.CmdWrite, proto.CmdFlagFUA, 2, uint64(c.off), uint32(c.n), data)
		e, _ = p.answer()
		require.Equal(t, proto.OK, e)
		require.Equal(t, want, d.bytes(0, 8192), "%+v", c)
	}
	for _, r := range d.requests() {
		require.Zero(t, (r.Off|r.Len)%512, "the device saw a part of a block")
		require.True(t, r.Op == block.Read || r.Flags&block.FUA != 0, "FUA was lost")
	}
	p.ask(proto.CmdWriteZeroes, 0, 3, 700, 1500, nil)
	e, _ := p.answer()
	require.Equal(t, proto.OK, e)
	clear(want[700:2200])
	require.Equal(t, want, d.bytes(0, 8192))
}

func TestAChangeOfPartOfABlockWaitsForWritesOfThatBlock(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	a, b := dial().enter(), dial().enter()
	d.mu.Lock()
	d.hold = true
	d.mu.Unlock()
	a.ask(proto.CmdWrite, 0, 1, 512, 512, bytes.Repeat([]byte{'a'}, 512))
	require.Eventually(t, func() bool { return len(d.requests()) == 1 }, 5*time.Second, time.Millisecond)
	b.ask(proto.CmdWrite, 0, 2, 600, 10, bytes.Repeat([]byte{'b'}, 10))
	time.Sleep(50 * time.Millisecond)
	require.Len(t, d.requests(), 1, "the block was read while a write of it was under way")
	d.release()
	e, _ := a.answer()
	require.Equal(t, proto.OK, e)
	e, _ = b.answer()
	require.Equal(t, proto.OK, e)
	want := bytes.Repeat([]byte{'a'}, 512)
	copy(want[88:], bytes.Repeat([]byte{'b'}, 10))
	require.Equal(t, want, d.bytes(512, 512))
}

func TestWritesWaitForAChangeOfPartOfTheirBlock(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	a, b := dial().enter(), dial().enter()
	d.mu.Lock()
	d.hold, d.only = true, true
	d.mu.Unlock()
	b.ask(proto.CmdWrite, 0, 2, 600, 10, bytes.Repeat([]byte{'b'}, 10))
	require.Eventually(t, func() bool { return len(d.requests()) == 2 }, 5*time.Second, time.Millisecond)
	a.ask(proto.CmdWrite, 0, 1, 0, 4096, bytes.Repeat([]byte{'a'}, 4096))
	time.Sleep(50 * time.Millisecond)
	require.Len(t, d.requests(), 2, "a write went to a block that is being changed")
	d.release()
	e, _ := b.answer()
	require.Equal(t, proto.OK, e)
	e, _ = a.answer()
	require.Equal(t, proto.OK, e)
	require.Equal(t, bytes.Repeat([]byte{'a'}, 4096), d.bytes(0, 4096))
}

// Four clients write odd stripes of the same blocks, and whole blocks beside
// them: none may undo what another one wrote.
func TestPartsOfABlockNeverUndoOneAnother(t *testing.T) {
	const clients, stripe, blocks = 4, 37, 16
	s := NewServer(Config{})
	d := &late{ram{data: make([]byte, 1<<20)}}
	require.NoError(t, s.AddExport(Export{Name: "disk", Device: d}))
	sock := t.TempDir() + "/n"
	ln := listenUnix(t, sock)
	go s.Serve(ln, Access{})
	t.Cleanup(func() { require.NoError(t, s.Shutdown(context.Background())) })
	var wg sync.WaitGroup
	want := make([]byte, len(d.data))
	for c := range clients {
		cl, err := client.Dial("unix", sock, "disk")
		require.NoError(t, err)
		t.Cleanup(func() { cl.Close() })
		wg.Add(1)
		go func() {
			defer wg.Done()
			for round := range 60 {
				at := (rand.N(blocks*512/(clients*stripe))*clients + c) * stripe
				data := bytes.Repeat([]byte{byte(c*64 + round)}, stripe)
				_, err := cl.WriteAt(data, int64(at))
				if err != nil {
					t.Error(err)
					return
				}
				copy(want[at:], data) // nobody else writes this stripe
				whole := 512 * (blocks + 1 + c)
				data = bytes.Repeat([]byte{byte(round)}, 512)
				if _, err = cl.WriteAt(data, int64(whole)); err != nil {
					t.Error(err)
					return
				}
				copy(want[whole:], data)
			}
		}()
	}
	wg.Wait()
	require.True(t, bytes.Equal(want, d.bytes(0, len(want))))
}
