package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestMessagesNeverWaitForTheirReader(t *testing.T) {
	r, pipe, err := os.Pipe()
	require.NoError(t, err)
	w := newLaterWriter(pipe)
	began := time.Now()
	line := strings.Repeat("x", 99) + "\n"
	for range 20000 { // nobody reads: the pipe and the buffer fill up
		fmt.Fprint(w, line)
	}
	require.Less(t, time.Since(began), 5*time.Second)
	w.flush() // gives up
	var got bytes.Buffer
	read := make(chan struct{})
	go func() { got.ReadFrom(r); close(read) }()
	require.Eventually(t, func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.buf) == 0 && !w.writing && w.lost == 0 }, 5*time.Second, time.Millisecond)
	fmt.Fprint(w, "the last one\n")
	w.flush()
	pipe.Close()
	<-read
	lines := strings.Split(strings.TrimSpace(got.String()), "\n")
	require.Equal(t, "the last one", lines[len(lines)-1])
	var whole, lost int
	for _, l := range lines {
		if l+"\n" == line {
			whole++
			continue
		}
		n := 0
		if fmt.Sscanf(l, "mpathd: %d messages", &n); n == 0 {
			require.Equal(t, "the last one", l)
		}
		lost += n
	}
	require.Equal(t, 20000, whole+lost)
	require.Greater(t, lost, 0)
	r.Close()
}
