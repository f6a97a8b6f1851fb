package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// A connection can change its server without its client noticing: the old
// server stops reading between two requests, answers what is in flight and
// gives the socket away; the new one goes on reading.

var errHandedOver = errors.New("connection handed over")

// Handed is a connection given away by HandOver.
type Handed struct {
	Export string
	File   *os.File // the caller closes it
}

// HandOver ends the connections of ServeTransmission between two requests, with
// nothing in flight, and returns their sockets. A connection that is not at
// such a point when ctx ends is closed and reported in the error: the kernel
// then sends its requests anew to the next server.
func (s *Server) HandOver(ctx context.Context) ([]Handed, error) {
	s.mu.Lock()
	var cns []*conn
	for cn := range s.conns {
		if cn.kernel {
			cns = append(cns, cn)
		}
	}
	s.mu.Unlock()
	for _, cn := range cns {
		cn.leaving.Store(true)
		cn.c.SetReadDeadline(time.Unix(1, 0)) // wakes the reader
	}
	var out []Handed
	var errs []error
	for _, cn := range cns {
		select {
		case f := <-cn.given:
			if f == nil {
				errs = append(errs, fmt.Errorf("connection of %s ended by itself", cn.export))
				continue
			}
			out = append(out, Handed{cn.export, f})
		case <-ctx.Done():
			errs = append(errs, fmt.Errorf("connection of %s has requests that do not end: %w", cn.export, ctx.Err()))
			cn.x.orphans.disown(cn) // what it has read and not begun is sent anew too
			cn.c.Close()
		}
	}
	return out, errors.Join(errs...)
}

// give puts the socket up for HandOver when transmit has ended.
func (cn *conn) give(err error) {
	if !errors.Is(err, errHandedOver) {
		close(cn.given)
		return
	}
	fc, ok := cn.c.(interface{ File() (*os.File, error) })
	if !ok {
		close(cn.given)
		return
	}
	f, err := fc.File()
	if err != nil {
		close(cn.given)
		return
	}
	cn.given <- f
}

// ServeHanded goes on with a connection that another server gave away. It owns
// f; see ServeTransmission.
func (s *Server) ServeHanded(f *os.File, name string) error {
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return fmt.Errorf("connection handed over for %s: %w", name, err)
	}
	return s.ServeTransmission(c, name)
}
