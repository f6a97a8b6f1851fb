package initiator_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

// Cases that are about a map of several paths: what moves where, and when a
// path comes back.
var mapCases = map[string]conformanceCase{
	"AS01": {"asks for a logout within 5 seconds", "moves new I/O to the other path at once, lets commands in flight end, logs out, and follows the redirect at the next login", func(t *testing.T) {
		var redirected func() int
		front := ""
		m := newMapped(t, 2, options{addr: func(path int, addr string) string {
			if path != 0 {
				return addr
			}
			if front == "" { // the path's own goroutine alone is here
				front, redirected = detour(t, addr)
			}
			return front
		}})
		m.hook(func(c *target.Cmd) target.Action { return target.Action{Delay: 700 * time.Millisecond} })
		_, slow := begin(m.g, block.Read, 0, 4096, 0)
		m.await("on its way", func() bool { return m.count(m.portals[0]) == 1 })
		logins := m.srv.Stats().Logins
		m.portals[0].Async(pdu.AsyncLogoutRequest, [8]byte{}, 0, 0, 5, nil)
		m.await("moved", func() bool { return m.g.Snapshot().Paths.Usable == 1 })
		require.Empty(t, slow, "the move waits for nothing")
		m.hook(nil)
		require.NoError(t, m.io(block.Write, 0, 4096))
		require.Equal(t, 1, m.count(m.portals[1]))
		require.NoError(t, finish(t, slow))
		require.Equal(t, 2, m.count(nil), "a command in flight was sent twice")
		m.await("back", func() bool { return m.g.Snapshot().Paths.Usable == 2 })
		require.Equal(t, logins+1, m.srv.Stats().Logins)
		require.Equal(t, 1, redirected())
		require.True(t, m.log.has("asked us to log out"))
		require.False(t, m.log.has("unfenced"), "nothing was in doubt")
	}},
	"AS02": {"asks for a logout and fails what is in flight with LOGICAL UNIT NOT SUPPORTED", "retries it on the other path, without an error", func(t *testing.T) {
		m := newMapped(t, 2, options{})
		m.hook(func(c *target.Cmd) target.Action {
			if c.Portal == m.portals[0] {
				return target.Action{Delay: 500 * time.Millisecond, Status: 2, Sense: target.Sense{Key: 5, ASC: 0x25}}
			}
			return target.Action{}
		})
		var all []chan *block.Request
		for i := range 8 {
			_, c := begin(m.g, block.Op(i%2), int64(i)*4096, 4096, 0)
			all = append(all, c)
		}
		m.await("on their way", func() bool { return m.count(m.portals[0]) == 8 })
		m.portals[0].Async(pdu.AsyncLogoutRequest, [8]byte{}, 0, 0, 5, nil)
		for _, c := range all {
			require.NoError(t, finish(t, c))
		}
		require.Equal(t, 8, m.count(m.portals[1]))
	}},
	"AS05": {"sends SCSI events: LUNs, access states or capacity changed, a reset, and one that is cut short", "rescans, asks for the access states, reads the capacity, verifies; ignores the last", func(t *testing.T) {
		rescans := make(chan string, 16)
		m := newMapped(t, 2, options{group: true, paths: paths.Config{Prio: "alua", OnLUNs: func(_, name string) { rescans <- name }}})
		event := func(sense ...byte) {
			m.portals[0].Async(pdu.AsyncSCSI, [8]byte{}, 0, 0, 0, append([]byte{0, byte(len(sense))}, sense...))
		}
		var inquiries, groups atomic.Int64
		m.srv.OnCommand(func(c *target.Cmd) target.Action {
			switch {
			case c.Portal != m.portals[0]:
			case c.Op() == 0x12:
				inquiries.Add(1)
			case c.Op() == 0xa3:
				groups.Add(1)
			}
			return target.Action{}
		})
		event(0x70, 0, 6)                              // no more than the key
		event()                                        // nothing
		m.portals[0].Async(0, [8]byte{}, 0, 0, 0, nil) // not even a length
		m.portals[0].Async(0, [8]byte{}, 0, 0, 0, []byte{0xff, 0xff, 0x72})
		require.NoError(t, m.io(block.Read, 0, 512)) // the session lives
		m.await("logged", func() bool { return m.log.has("asynchronous event") })
		require.Zero(t, inquiries.Load())
		require.Zero(t, groups.Load())
		event(fixedSense(6, 0x2a, 6)...)
		m.await("access states", func() bool { return groups.Load() > 0 })
		require.Zero(t, inquiries.Load())
		for _, ascq := range []byte{9, 0} {
			before := inquiries.Load()
			event(fixedSense(6, []byte{0x29, 0x2a}[ascq/9], ascq)...)
			m.await("verified", func() bool { return inquiries.Load() > before })
			m.await("serves", func() bool { return m.g.Snapshot().Paths.Usable == 2 && m.io(block.Read, 0, 512) == nil })
		}
		require.Empty(t, rescans)
		event(fixedSense(6, 0x3f, 0x0e)...)
		require.Equal(t, iqn, <-rescans)
		m.await("serves", func() bool { return m.g.Snapshot().Paths.Usable == 2 })
	}},
	"TM06": {"completes LOGICAL UNIT RESET", "issues its own commands of that unit again, once, on all paths", func(t *testing.T) {
		m := newMapped(t, 2, options{paths: paths.Config{Policy: "multibus", Selector: "round-robin 0"},
			session: func(path int, c *initiator.Config) {
				if path == 0 {
					c.CommandTimeout = time.Second
				} // the other one has 30 s
			}})
		var resets atomic.Int64
		m.srv.OnTask(func(tk target.Task) target.TaskAction {
			switch {
			case tk.Function == pdu.TMFLUReset:
				resets.Add(1)
			case tk.Portal == m.portals[0]:
				return target.TaskAction{Response: pdu.TMFNotSupported}
			}
			return target.TaskAction{}
		})
		seen := map[uint64]int{} // the hook runs on two connections
		lock := make(chan struct{}, 1)
		m.hook(func(c *target.Cmd) target.Action {
			lock <- struct{}{}
			defer func() { <-lock }()
			lba := uint64(c.CDB[8])<<8 | uint64(c.CDB[9])
			if seen[lba]++; seen[lba] == 1 {
				return target.Action{Silent: true}
			}
			return target.Action{}
		})
		began := time.Now()
		var all []chan *block.Request
		for i := range 6 {
			_, c := begin(m.g, block.Op(i/2%2), int64(i)*4096, 4096, 0)
			all = append(all, c)
		}
		for _, c := range all {
			require.NoError(t, finish(t, c))
		}
		require.Less(t, time.Since(began), 20*time.Second, "the other path waited for its own timeout")
		require.EqualValues(t, 1, resets.Load())
		lock <- struct{}{}
		defer func() { <-lock }()
		for lba, n := range seen {
			require.Equal(t, 2, n, "block %d", lba)
		}
	}},
	"TM08": {"answers TASK ABORTED", "retries on the same path; five times, not for ever", func(t *testing.T) {
		m := newMapped(t, 2, options{paths: paths.Config{Policy: "multibus", Selector: "round-robin 0"}})
		m.hook(once(target.Action{Status: 0x40}))
		require.NoError(t, m.io(block.Write, 0, 4096))
		require.Contains(t, []int{0, 2}, m.count(m.portals[0]))
		require.Equal(t, 2, m.count(nil))
		m.hook(func(*target.Cmd) target.Action { return target.Action{Status: 0x40} })
		require.ErrorIs(t, m.io(block.Read, 0, 4096), block.ErrIO)
		require.Equal(t, 8, m.count(nil))
	}},
	"TM09": {"does not answer LOGICAL UNIT RESET on the session that fences an old one", "goes on serving through the healthy path", func(t *testing.T) {
		m := newMapped(t, 2, options{paths: paths.Config{NoPathRetry: paths.Queue}})
		asked := make(chan struct{}, 16)
		m.srv.OnTask(func(tk target.Task) target.TaskAction {
			if tk.Portal == m.portals[0] {
				asked <- struct{}{}
				return target.TaskAction{Silent: true}
			}
			return target.TaskAction{}
		})
		m.hook(func(c *target.Cmd) target.Action {
			if c.Portal == m.portals[0] {
				return target.Action{Delay: time.Hour}
			}
			return target.Action{}
		})
		_, w := begin(m.g, block.Write, 0, 4096, 0)
		m.await("on its way", func() bool { return m.count(m.portals[0]) == 1 })
		m.portals[0].Drop()
		require.NoError(t, finish(t, w))
		<-asked // the fence hangs
		for i := range 50 {
			began := time.Now()
			require.NoError(t, m.io(block.Op(i%2), int64(1+i)*4096, 4096))
			require.Less(t, time.Since(began), 5*time.Second)
		}
		require.Len(t, m.g.Snapshot().Safety.Unfenced, 1)
		require.Equal(t, 51, m.count(m.portals[1]))
	}},
	"RJ05": {"rejects one command after the other", "keeps the path apart while another one serves, longer and longer", func(t *testing.T) {
		m := newMapped(t, 2, options{})
		m.hook(func(c *target.Cmd) target.Action {
			if c.Portal == m.portals[0] {
				return target.Action{Reject: pdu.RejectProtocol}
			}
			return target.Action{}
		})
		end := time.Now().Add(20 * time.Second)
		for m.path(0).State != "delayed" {
			require.NoError(t, m.io(block.Read, 0, 4096))
			require.True(t, time.Now().Before(end), "not quarantined")
		}
		n := m.count(m.portals[0])
		require.LessOrEqual(t, n, 3)
		for range 100 {
			require.NoError(t, m.io(block.Read, 0, 4096))
		}
		require.Equal(t, n, m.count(m.portals[0]))
		require.True(t, m.log.has(fmt.Sprintf("reason %#02x", pdu.RejectProtocol)))

		// A storm within one session ends it.
		s := watches(t, nil, func(r *raw) {
			if !r.login() {
				return
			}
			r.window = 4
			for {
				h, _, ok := r.command()
				if !ok {
					return
				}
				r.rejectPDU(pdu.RejectResources, h)
			}
		})
		for s.Err() == nil && time.Now().Before(end) {
			w := &waited{done: make(chan struct{})}
			w.c = &initiator.Command{Owner: w}
			var p block.Plug
			if s.Submit(w.c, &p) {
				p.Flush()
				w.result(t)
			}
		}
		require.ErrorContains(t, ends(t, s), "rejects within")
	}},
}
