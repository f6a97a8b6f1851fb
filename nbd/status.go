package nbd

import (
	"context"
	"net"
	"strings"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd/proto"
)

// Meta contexts (proto.md, "Metadata querying"); the index is the context ID.
const (
	contextAllocation = iota
	contextPath
	contextCount
)

var metaContexts = [contextCount]string{proto.BaseAllocation, "x-mpathd:path"}

const maxExtents = 4096 // of one answer

// A pathTeller is a Device that can name the path in use by a number.
type pathTeller interface{ ServingPath() uint32 }

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (s *Server) metaContext(c net.Conn, opt uint32, data []byte, a *agreed) error {
	invalid := func() error { return reply(c, opt, proto.RepErrInvalid, nil) }
	text := func() (string, bool) {
		if len(data) < 4 || int64(be.Uint32(data)) > int64(len(data)-4) {
			return "", false
		}
		n := be.Uint32(data)
		t := string(data[4 : 4+n])
		data = data[4+n:]
		return t, true
	}
	name, ok := text()
	if !ok || len(name) > proto.MaxString || len(data) < 4 {
		return invalid()
	}
	if opt == proto.OptSetMetaContext {
		if !a.structured {
			return invalid()
		}
		a.contexts, a.of = [contextCount]bool{}, nil
	}
	count := be.Uint32(data)
	data = data[4:]
	var queries []string
	for range min(count, maxOption/4) {
		q, ok := text()
		if !ok {
			return invalid()
		}
		queries = append(queries, q)
	}
	if len(data) != 0 || int(count) != len(queries) {
		return invalid()
	}
	x := s.find(name)
	if x == nil {
		return reply(c, opt, proto.RepErrUnknown, []byte("no such export"))
	}
	if opt == proto.OptSetMetaContext {
		a.of = x
	}
	for id, have := range metaContexts {
		wanted := opt == proto.OptListMetaContext && len(queries) == 0
		for _, q := range queries {
			// "namespace:" alone asks for all of it, in a list only.
			space, _, _ := strings.Cut(have, ":")
			wanted = wanted || q == have || opt == proto.OptListMetaContext && q == space+":"
		}
		if !wanted {
			continue
		}
		number := uint32(0)
		if opt == proto.OptSetMetaContext {
			a.contexts[id] = true
			number = uint32(id)
		}
		if err := reply(c, opt, proto.RepMetaContext, append(be.AppendUint32(nil, number), have...)); err != nil {
			return err
		}
	}
	return reply(c, opt, proto.RepAck, nil)
}

// extents asks for whole blocks and cuts the answer to what was asked for.
func extents(m block.Mapper, off, n, bs int64, limit int) []block.Extent {
	start, end := off/bs*bs, (off+n+bs-1)/bs*bs
	all := m.Extents(context.Background(), start, end-start, limit)
	all[0].Len -= off - start
	for i := range all {
		if all[i].Len >= n {
			all[i].Len = n
			return all[:i+1]
		}
		n -= all[i].Len
	}
	return all
}

// blockStatus answers BLOCK_STATUS with a chunk for each context. It runs in a
// goroutine of its own, because the device may have to be asked; the slot
// bounds how many there are.
func (cn *conn) blockStatus(idx uint16, rq proto.Request) {
	limit := maxExtents
	if rq.Flags&proto.CmdFlagReqOne != 0 {
		limit = 1
	}
	var tail []byte
	last := 0 // where the header of the last chunk begins
	for id, on := range cn.agreed.contexts {
		if !on {
			continue
		}
		type run struct {
			n      int64
			status uint32
		}
		var runs []run
		switch id {
		case contextAllocation:
			all := []block.Extent{{Len: int64(rq.Length)}}
			if m, ok := cn.x.Device.(block.Mapper); ok {
				all = extents(m, int64(rq.Offset), int64(rq.Length), int64(cn.x.limits.Load().Block), limit)
			}
			for _, e := range all {
				st := uint32(0)
				if e.Hole {
					st |= proto.StateHole
				}
				if e.Zero {
					st |= proto.StateZero
				}
				runs = append(runs, run{e.Len, st})
			}
		case contextPath:
			st := uint32(0)
			if d, ok := cn.x.Device.(pathTeller); ok {
				st = d.ServingPath()
			}
			runs = []run{{int64(rq.Length), st}}
		}
		var h [proto.ExtendedLen]byte
		last = len(tail)
		if cn.agreed.extended {
			proto.PutExtendedChunk(h[:], proto.ChunkBlockStatusExt, rq.Cookie, rq.Offset, 8+16*len(runs))
			tail = be.AppendUint32(append(tail, h[:]...), uint32(id))
			tail = be.AppendUint32(tail, uint32(len(runs)))
			for _, r := range runs {
				tail = be.AppendUint64(be.AppendUint64(tail, uint64(r.n)), uint64(r.status))
			}
		} else {
			proto.PutChunk(h[:], proto.ChunkBlockStatus, rq.Cookie, 4+8*len(runs))
			tail = be.AppendUint32(append(tail, h[:proto.ChunkLen]...), uint32(id))
			for _, r := range runs {
				tail = be.AppendUint32(be.AppendUint32(tail, uint32(r.n)), r.status)
			}
		}
		be.PutUint16(tail[last+4:], 0) // more chunks follow
	}
	be.PutUint16(tail[last+4:], proto.ChunkDone)
	cn.slots[idx].tail = tail
	var p block.Plug
	cn.list(idx, 0, &p)
	p.Flush()
}
