package main

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// systemd hears of us while the data path works, and no more when it stands still
// or its locks are held.
func TestKeepAlivesStopWhenTheDataPathHangs(t *testing.T) {
	at := filepath.Join(t.TempDir(), "notify")
	ln, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at, Net: "unixgram"})
	require.NoError(t, err)
	defer ln.Close()
	t.Setenv("NOTIFY_SOCKET", at)
	t.Setenv("WATCHDOG_USEC", "60000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	hears := func(within time.Duration) bool {
		ln.SetReadDeadline(time.Now().Add(within))
		b := make([]byte, 64)
		n, err := ln.Read(b)
		if err == nil {
			require.Equal(t, "WATCHDOG=1", string(b[:n]))
		}
		return err == nil
	}
	const long, several = 20 * time.Second, 400 * time.Millisecond // of 20 ms each
	var stands atomic.Bool
	var asked atomic.Int64
	locks := make(chan struct{}, 1)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		feedWatchdog(done, func() []string {
			asked.Add(1)
			locks <- struct{}{}
			<-locks
			if stands.Load() {
				return []string{"xensan"}
			}
			return nil
		}, slog.New(slog.DiscardHandler))
	}()
	quiet := func() {
		was := asked.Load()
		require.Eventually(t, func() bool { return asked.Load() > was+1 || len(locks) > 0 }, long, time.Millisecond)
		for hears(time.Millisecond) { // those before
		}
		require.False(t, hears(several))
	}
	for range 3 {
		require.True(t, hears(long))
	}
	stands.Store(true)
	quiet()
	stands.Store(false)
	require.True(t, hears(long))
	locks <- struct{}{} // held by somebody else
	quiet()
	<-locks
	require.True(t, hears(long))
	close(done)
	<-ended
}
