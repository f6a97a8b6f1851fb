package initiator_test

import (
	"context"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/sys"
)

// slowly reads as if the line were slow.
type slowly struct {
	net.Conn
	perSecond int
}

func (c slowly) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b[:min(len(b), 4<<10)])
	time.Sleep(time.Duration(n) * time.Second / time.Duration(c.perSecond))
	return n, err
}

const megabyte = 1 << 20

// asksForAll asks for all of a write of a megabyte at once, on a connection that
// holds little of it.
func asksForAll(r *raw) (ok bool) {
	r.Conn.(*net.TCPConn).SetReadBuffer(32 << 10)
	r.login("InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", "1048576", "MaxRecvDataSegmentLength", "8192")
	h, _, ok := r.command()
	r.r2t(h.ITT(), 1, 0, 0, megabyte)
	return ok
}

// The target says nothing for many times FailoverTime, since the write has not
// reached it yet.
func TestDataThatGetsThroughSlowlyIsASignOfLife(t *testing.T) {
	t.Parallel()
	c := scripted(t, func(_ int, r *raw) {
		ok := asksForAll(r)
		r.Conn = slowly{r.Conn, megabyte / 2}
		var h pdu.Header
		for ok && (h.Opcode() != pdu.OpDataOut || !h.IsFinal()) {
			h, _, ok = r.read()
		}
		assert.True(t, ok)
		r.good(h.ITT(), nil)
		r.drain()
	})
	ev := &events{}
	c.Dial, c.FailoverTime, c.OnState = smallBuffer(32<<10), 500*time.Millisecond, ev.on
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	t.Cleanup(func() { s.Abort(os.ErrClosed); <-s.Done() })
	began := time.Now()
	require.NoError(t, write(t, s, megabyte).result(t).Err)
	require.Greater(t, time.Since(began), 3*c.FailoverTime)
	require.NotContains(t, ev.list(), initiator.Dead)
}

// A target that hangs is silent although its kernel acknowledges what it is sent.
func TestAcknowledgementsOfAHungTargetAreNoSignOfLife(t *testing.T) {
	t.Parallel()
	hung := make(chan struct{})
	c := scripted(t, func(_ int, r *raw) {
		r.login()
		<-hung
	})
	c.FailoverTime = 500 * time.Millisecond
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	t.Cleanup(func() { s.Abort(os.ErrClosed); <-s.Done() })
	defer close(hung)
	ws := []*waited{write(t, s, 64<<10), write(t, s, 64<<10)}
	began := time.Now()
	for _, w := range ws {
		require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
	}
	require.ErrorContains(t, s.Err(), "no sign of life")
	require.Less(t, time.Since(began), 2*c.FailoverTime)
}

func TestTimeoutOfTheKernelIsNotCalledTheTargetsEnd(t *testing.T) {
	t.Parallel()
	stuck := make(chan struct{})
	c := scripted(t, func(_ int, r *raw) {
		asksForAll(r)
		<-stuck
	})
	var tc *net.TCPConn
	c.FailoverTime = 20 * time.Second // the kernel is first
	dial := smallBuffer(32 << 10)
	c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		nc, err := dial(ctx, network, address)
		tc, _ = nc.(*net.TCPConn)
		return nc, err
	}
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	require.NoError(t, sys.UserTimeout(tc, 100*time.Millisecond))
	require.ErrorIs(t, write(t, s, megabyte).result(t).Err, initiator.ErrSessionLost)
	close(stuck)
	require.ErrorIs(t, s.Err(), syscall.ETIMEDOUT)
	require.False(t, initiator.ClosedByTarget(s.Err()))
}

// What is sent again and not acknowledged makes a path suspect before silence does.
func TestWhatGetsNoAcknowledgementIsSuspectEarly(t *testing.T) {
	t.Parallel()
	deaf, hears := make(chan struct{}), make(chan struct{})
	hear := sync.OnceFunc(func() { close(hears) })
	c := scripted(t, func(_ int, r *raw) {
		r.login()
		raw, err := r.Conn.(*net.TCPConn).SyscallConn()
		assert.NoError(t, err)
		drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}} // every segment, before it is acknowledged
		raw.Control(func(fd uintptr) {
			assert.NoError(t, unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop[0]}))
		})
		close(deaf)
		<-hears
		raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0) })
		h, _, _ := r.command()
		r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
		r.drain()
	})
	t.Cleanup(hear)
	c.FailoverTime = 10 * time.Second // silence makes it suspect after 3 s
	causes := make(chan error, 4)
	c.OnState = func(_ initiator.State, cause error) { causes <- cause }
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	t.Cleanup(func() { s.Abort(os.ErrClosed); <-s.Done() })
	<-deaf
	w := read8(t, s)
	require.ErrorContains(t, <-causes, "acknowledges nothing of what was sent again")
	hear()
	require.NoError(t, w.result(t).Err)
	require.NoError(t, <-causes, "up again")
}
