package attach

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/internal/sys"
)

// playedKernel takes the ends that a keeper hands out.
type playedKernel struct {
	mu   sync.Mutex
	ends []net.Conn
	gone bool  // the device is no more
	fail error // of the next reconnect
}

func (p *playedKernel) reconnect(f *os.File) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.fail; err != nil {
		p.fail = nil
		return err
	}
	c, err := net.FileConn(f)
	p.ends = append(p.ends, c)
	return err
}

func (p *playedKernel) end(t *testing.T, n int) net.Conn {
	t.Helper()
	require.Eventually(t, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return len(p.ends) > n }, 20*time.Second, 5*time.Millisecond)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ends[n]
}

// echo serves a connection: it sends back what comes, until the client leaves (an
// error) or says goodbye.
func echo(c net.Conn) error {
	defer c.Close()
	b := make([]byte, 1)
	for {
		if _, err := io.ReadFull(c, b); err != nil {
			return err
		}
		if b[0] == 'q' {
			return nil
		}
		c.Write(b)
	}
}

func works(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	_, err := c.Write([]byte{'x'})
	require.NoError(t, err)
	_, err = io.ReadFull(c, make([]byte, 1))
	require.NoError(t, err)
}

func startKeeper(t *testing.T, connections int) (*keeper, *playedKernel, *sync.WaitGroup) {
	p := &playedKernel{}
	var serving sync.WaitGroup
	serving.Add(connections)
	o := Options{Serve: echo}
	o.defaults()
	k := newKeeper(o)
	k.device, k.reconnect, k.there = "/dev/nbd9", p.reconnect, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return !p.gone }
	for range connections {
		a, b, err := sys.SocketPair()
		require.NoError(t, err)
		require.NoError(t, p.reconnect(a))
		a.Close()
		go func() { defer serving.Done(); k.keep(b) }()
	}
	close(k.known)
	return k, p, &serving
}

// One dead connection of several is replaced, whatever the new one meets, and the
// others do not notice.
func TestAConnectionThatTheKernelGivesUpIsReplaced(t *testing.T) {
	_, p, serving := startKeeper(t, 3)
	for _, c := range p.ends {
		works(t, c)
	}
	p.mu.Lock()
	p.fail = errors.New("not now") // the first try to reconnect
	p.mu.Unlock()
	p.ends[1].Close()
	works(t, p.end(t, 3))
	works(t, p.ends[0])
	works(t, p.ends[2])
	p.end(t, 3).Close()
	works(t, p.end(t, 4))
	for _, n := range []int{0, 2, 4} { // detached: the kernel says goodbye on each
		_, err := p.end(t, n).Write([]byte{'q'})
		require.NoError(t, err)
	}
	serving.Wait()
	require.Len(t, p.ends, 5, "connections to a device that was detached")
}

func TestNoConnectionIsMadeToADeviceThatIsGone(t *testing.T) {
	_, p, serving := startKeeper(t, 1)
	p.mu.Lock()
	p.gone = true
	p.mu.Unlock()
	p.ends[0].Close()
	serving.Wait()
	require.Len(t, p.ends, 1)
}

func TestNoConnectionIsMadeAfterTheEnd(t *testing.T) {
	k, p, serving := startKeeper(t, 2)
	k.cancel()
	p.ends[0].Close()
	p.ends[1].Close()
	serving.Wait()
	require.Len(t, p.ends, 2)
	require.ErrorIs(t, k.ctx.Err(), context.Canceled)
}

// A device that could not be made leaves nobody serving.
func TestConnectionsThatTheKernelDidNotTakeAreEnded(t *testing.T) {
	served := make(chan error)
	o := Options{Serve: func(c net.Conn) error { err := echo(c); served <- err; return err }}
	o.defaults()
	k := newKeeper(o)
	files, err := k.open(2)
	require.NoError(t, err)
	require.Len(t, files, 2)
	k.abandon()
	closeAll(files)
	for range 2 {
		require.Error(t, <-served)
	}
}

func TestConnectionsAreCountedByTheirQueues(t *testing.T) {
	root := t.TempDir()
	require.Equal(t, 1, connections(root, 0))
	for _, q := range []string{"0", "1", "2"} {
		require.NoError(t, os.MkdirAll(root+"/sys/block/nbd0/mq/"+q, 0o755))
	}
	require.Equal(t, 3, connections(root, 0))
}
