package nbd

import (
	"sync"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/internal/sys"
)

// clients are the connections of an export that came through a socket, and the
// buffers that they share while there is one: nothing that they do takes memory
// from another export or from the kernel's device.
type clients struct {
	mu    sync.Mutex
	conns []*conn
	arena *block.Arena
	// A piece for each connection, so that clients that hold everything else and do
	// nothing slow the others down, but stop none.
	reserve *block.Arena
}

// reserved is how much of the reserve a connection may have, in bytes.
const reserved = 64 << 10

// A client that holds buffers which others wait for must move stuckBytes, of
// replies that it reads or writes that it sends, in each stuckTime.
const (
	stuckTime  = 5 * time.Second
	stuckBytes = 256 << 10
)

// enter admits a client, unless there are too many.
func (k *clients) enter(cn *conn, c *Config) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.conns) >= c.MaxConnections {
		return false
	}
	if k.arena == nil {
		k.arena = block.NewArena(c.MaxBytes)
		k.arena.Starved = k.evict
		k.reserve = block.NewArena(c.MaxConnections * reserved)
	}
	cn.arena, cn.share, cn.reserve = k.arena, c.MaxBytes/2, k.reserve
	k.conns = append(k.conns, cn)
	return true
}

func (k *clients) leave(cn *conn) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, have := range k.conns {
		if have == cn {
			k.conns = append(k.conns[:i], k.conns[i+1:]...)
			break
		}
	}
	if len(k.conns) == 0 {
		k.arena.Close()
		k.reserve.Close()
		k.arena, k.reserve = nil, nil
	}
}

// passed is how many bytes of requests came from the client and of replies reached
// it: what waits in the kernel for it to read does not count.
func (cn *conn) passed() int64 { return cn.moved.Load() - int64(sys.Unsent(cn.c)) }

// evict cuts the clients that hold buffers and wait to be served by nobody: they
// read no replies, or do not send the rest of a write.
func (k *clients) evict() {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	for _, cn := range k.conns {
		at := cn.passed()
		if cn.seenAt.IsZero() || at-cn.seen >= stuckBytes || cn.awaits.Load() == 0 || cn.held.Load() == 0 {
			cn.seen, cn.seenAt = at, now
			continue
		}
		if now.Sub(cn.seenAt) >= cn.s.cfg.stuck {
			cn.s.cfg.Logger.Warn("NBD client cut: it holds buffers that others wait for and does nothing", "client", cn.c.RemoteAddr().String(), "export", cn.x.Name)
			cn.c.Close()
		}
	}
}
