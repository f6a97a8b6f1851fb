package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestReconnectsAskNoNameServer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	asked := atomic.Int32{}
	hang := make(chan struct{})
	n := newNames()
	n.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
		require.Equal(t, "san1.example", host)
		if asked.Add(1) > 1 {
			<-hang
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
		}
		return []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.1")}, nil
	}
	down := atomic.Bool{}
	real := n.connect
	var tried []string
	n.connect = func(ctx context.Context, network, address string) (net.Conn, error) {
		tried = append(tried, address)
		if down.Load() || address != "127.0.0.1:"+port {
			return nil, errors.New("down")
		}
		return real(ctx, network, address)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for range 3 {
		c, err := n.dial(ctx, "tcp", "san1.example:"+port)
		require.NoError(t, err)
		c.Close()
	}
	require.EqualValues(t, 1, asked.Load(), "each try asks the name server")
	down.Store(true)
	for range 3 { // the lookup hangs: nobody waits for it, and there is one
		_, err = n.dial(ctx, "tcp", "san1.example:"+port)
		require.ErrorContains(t, err, "down")
	}
	require.Eventually(t, func() bool { return asked.Load() == 2 }, 5*time.Second, time.Millisecond)
	close(hang)
	require.Eventually(t, func() bool { n.mu.Lock(); defer n.mu.Unlock(); return len(n.known["san1.example"]) == 1 }, 5*time.Second, time.Millisecond)
	down.Store(false)
	tried = nil
	c, err := n.dial(ctx, "tcp", "san1.example:"+port)
	require.NoError(t, err)
	c.Close()
	require.Equal(t, []string{"127.0.0.1:" + port}, tried, "the new address is not used")
}

// A target that redirects to ever new names costs no more memory than that.
func TestNamesOfRedirectsDoNotPileUp(t *testing.T) {
	n := newNames()
	n.lookup = func(context.Context, string) ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
	}
	n.connect = func(context.Context, string, string) (net.Conn, error) {
		c, _ := net.Pipe()
		return c, nil
	}
	for i := range 10 * maxNames {
		_, err := n.dial(t.Context(), "tcp", fmt.Sprintf("n%d.example:3260", i))
		require.NoError(t, err)
	}
	require.Len(t, n.known, maxNames)
}
