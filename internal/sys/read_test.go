package sys

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// ends are the two ends of a connection, the first with a Reader.
func ends(t *testing.T, network string) (net.Conn, *Reader, net.Conn) {
	t.Helper()
	at := "127.0.0.1:0"
	if network == "unix" {
		at = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, at)
	require.NoError(t, err)
	defer l.Close()
	a, err := net.Dial(network, l.Addr().String())
	require.NoError(t, err)
	b, err := l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { a.Close(); b.Close() })
	rc, err := RawConn(a)
	require.NoError(t, err)
	return a, NewReader(rc), b
}

func TestReaderGivesWhatANetConnGives(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			a, r, b := ends(t, network)
			buf := make([]byte, 8)
			n, err := r.Read(nil)
			require.NoError(t, err)
			require.Zero(t, n)
			time.AfterFunc(20*time.Millisecond, func() { b.Write([]byte("cannae")) }) // it waits
			n, err = r.Read(buf)
			require.NoError(t, err)
			require.Equal(t, "cannae", string(buf[:n]))

			a.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			_, err = r.Read(buf)
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			a.SetReadDeadline(time.Time{})
			b.Write([]byte("zama"))
			n, err = r.Read(buf)
			require.NoError(t, err)
			require.Equal(t, "zama", string(buf[:n]))

			one := []byte("x")
			require.Zero(t, testing.AllocsPerRun(100, func() {
				b.Write(one)
				r.Read(buf)
			}))

			b.Close()
			_, err = r.Read(buf)
			require.Equal(t, io.EOF, err)
			a.Close()
			_, err = r.Read(buf)
			require.ErrorIs(t, err, net.ErrClosed)
		})
	}
}

func TestReaderToldOfAReset(t *testing.T) {
	_, r, b := ends(t, "tcp")
	b.(*net.TCPConn).SetLinger(0)
	time.AfterFunc(20*time.Millisecond, func() { b.Close() })
	_, err := r.Read(make([]byte, 8))
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

func TestReaderEndsWhenItsConnectionIsClosed(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		a, r, _ := ends(t, network)
		time.AfterFunc(20*time.Millisecond, func() { a.Close() })
		_, err := r.Read(make([]byte, 8))
		require.ErrorIs(t, err, net.ErrClosed)
	}
}
