package paths

import (
	"testing"
	"time"

	"github.com/mpathd/mpathd/block"
)

// What protection costs a write on a healthy path, from Submit to Complete.
func BenchmarkWriteOnAHealthyPath(b *testing.B) {
	for _, mode := range []string{Off, Hold, Strict, Shadow} {
		b.Run(mode, func(b *testing.B) {
			g, doors, _ := newGroup(b, Config{NoPathRetry: Queue, Protection: mode}, 2, 8)
			defer closeGroup(g)
			for doors[0].session() == nil || len(g.table.Load().all) < 2 {
				time.Sleep(time.Millisecond)
			}
			s := doors[0].session()
			r := &block.Request{Op: block.Write, Data: make([]byte, fakeBlock), Len: fakeBlock, Owner: nobody{}}
			var p block.Plug
			b.ReportAllocs()
			for b.Loop() {
				g.Submit(r, &p)
				c := s.out[0]
				s.out = s.out[:0]
				c.Owner.Done(c, &p)
				p.Flush()
			}
		})
	}
}
