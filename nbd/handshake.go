package nbd

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/mpathd/mpathd/nbd/proto"
)

// Bounds of a handshake, so that a client costs little before it is known.
const (
	maxOption  = 64 << 10 // bytes of one option's data
	maxOptions = 64
)

var be = binary.BigEndian

// agreed is what a handshake settled besides the export.
type agreed struct {
	tls        net.Conn // nil without TLS
	structured bool     // also with extended headers
	extended   bool
	contexts   [contextCount]bool // of metaContexts, negotiated
	of         *export            // the export they are for
}

// handshake negotiates (proto.md, "Fixed newstyle negotiation") and returns
// the chosen export, or nil when the client left in peace.
func (s *Server) handshake(c net.Conn, mode TLSMode) (_ *export, a agreed, err error) {
	if s.cfg.TLS == nil {
		mode = TLSOff
	}
	var b [18]byte
	be.PutUint64(b[0:], proto.Magic)
	be.PutUint64(b[8:], proto.OptionMagic)
	offered := proto.FlagFixedNewstyle | proto.FlagNoZeroes
	if s.cfg.Without.NoZeroes {
		offered = proto.FlagFixedNewstyle
	}
	be.PutUint16(b[16:], offered)
	if _, err := c.Write(b[:]); err != nil {
		return nil, a, err
	}
	if _, err := io.ReadFull(c, b[:4]); err != nil {
		return nil, a, err
	}
	flags := be.Uint32(b[:])
	if flags&^uint32(offered) != 0 {
		return nil, a, fmt.Errorf("unknown client flags %#x", flags)
	}
	for range maxOptions {
		if _, err := io.ReadFull(c, b[:16]); err != nil {
			if err == io.EOF {
				return nil, a, nil
			}
			return nil, a, err
		}
		opt, n := be.Uint32(b[8:]), be.Uint32(b[12:])
		if be.Uint64(b[:]) != proto.OptionMagic || n > maxOption {
			return nil, a, errors.New("bad option header")
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c, data); err != nil {
			return nil, a, err
		}
		if n == 0 && opt == proto.OptGo {
			if data, err = goWithoutLength(c); err != nil {
				return nil, a, err
			}
		}
		// Options from a client that did not announce fixed newstyle are answered
		// all the same: go-nbd announces nothing and uses GO.
		if opt == proto.OptStartTLS && mode != TLSOff && (a.tls != nil || n != 0) {
			if err := reply(c, opt, proto.RepErrInvalid, nil); err != nil {
				return nil, a, err
			}
			continue
		}
		if opt == proto.OptStartTLS && mode != TLSOff {
			if err := reply(c, opt, proto.RepAck, nil); err != nil {
				return nil, a, err
			}
			t := tls.Server(c, s.cfg.TLS)
			if err := t.Handshake(); err != nil {
				return nil, a, fmt.Errorf("TLS: %w", err)
			}
			c, a = t, agreed{tls: t} // all that was agreed in the clear is void
			continue
		}
		if mode == TLSRequired && a.tls == nil && opt != proto.OptAbort {
			if opt == proto.OptExportName {
				return nil, a, errors.New("EXPORT_NAME before TLS")
			}
			if err := reply(c, opt, proto.RepErrTLSReqd, []byte("this server wants TLS")); err != nil {
				return nil, a, err
			}
			continue
		}
		x, done, err := s.option(c, opt, data, flags, &a)
		if err != nil || done {
			if x != a.of { // contexts were for another export
				a.contexts = [contextCount]bool{}
			}
			return x, a, err
		}
	}
	return nil, a, errors.New("too many options")
}

// goWithoutLength reads the data of a GO whose header says that there is none.
// The client of pojntfx/go-nbd v0.3.2 sends it so; a conforming GO has at least
// six bytes, so there is nothing else that it could mean.
func goWithoutLength(c net.Conn) ([]byte, error) {
	b := make([]byte, 4, 4+proto.MaxString+2)
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, err
	}
	n := be.Uint32(b)
	if n > proto.MaxString {
		return nil, errors.New("GO without data")
	}
	b = b[:4+n+2]
	if _, err := io.ReadFull(c, b[4:]); err != nil {
		return nil, err
	}
	infos := make([]byte, 2*int(be.Uint16(b[4+n:])))
	if _, err := io.ReadFull(c, infos); err != nil {
		return nil, err
	}
	return append(b, infos...), nil
}

func reply(c net.Conn, opt, typ uint32, data []byte) error {
	b := make([]byte, 20, 20+len(data))
	be.PutUint64(b[0:], proto.ReplyMagic)
	be.PutUint32(b[8:], opt)
	be.PutUint32(b[12:], typ)
	be.PutUint32(b[16:], uint32(len(data)))
	_, err := c.Write(append(b, data...))
	return err
}

func (s *Server) option(c net.Conn, opt uint32, data []byte, flags uint32, a *agreed) (x *export, done bool, err error) {
	if s.cfg.Without.hides(opt) {
		return nil, false, reply(c, opt, proto.RepErrUnsup, nil)
	}
	switch opt {
	case proto.OptExportName:
		if a.extended {
			return nil, true, errors.New("EXPORT_NAME after EXTENDED_HEADERS: GO was due")
		}
		if x = s.find(string(data)); x == nil {
			return nil, true, fmt.Errorf("unknown export %.80q", data)
		}
		b := make([]byte, 10+124)
		be.PutUint64(b, uint64(x.limits.Load().Size))
		be.PutUint16(b[8:], a.flags(x))
		if flags&uint32(proto.FlagNoZeroes) != 0 {
			b = b[:10]
		}
		_, err = c.Write(b)
		return x, true, err
	case proto.OptAbort:
		reply(c, opt, proto.RepAck, nil)
		return nil, true, nil
	case proto.OptList:
		if len(data) != 0 {
			return nil, false, reply(c, opt, proto.RepErrInvalid, nil)
		}
		for _, n := range s.names() {
			b := binary.BigEndian.AppendUint32(nil, uint32(len(n)))
			if err := reply(c, opt, proto.RepServer, append(b, n...)); err != nil {
				return nil, true, err
			}
		}
		return nil, false, reply(c, opt, proto.RepAck, nil)
	case proto.OptInfo, proto.OptGo:
		x, err = s.info(c, opt, data, a)
		return x, err != nil || x != nil && opt == proto.OptGo, err
	}
	switch opt {
	case proto.OptStructuredReply, proto.OptExtendedHeaders:
		switch {
		case a.extended && opt == proto.OptStructuredReply:
			return nil, false, reply(c, opt, proto.RepErrExtHeaderReqd, []byte("extended headers are agreed"))
		case len(data) != 0, a.extended, a.structured && opt == proto.OptStructuredReply:
			return nil, false, reply(c, opt, proto.RepErrInvalid, nil)
		}
		a.structured, a.extended = true, opt == proto.OptExtendedHeaders
		return nil, false, reply(c, opt, proto.RepAck, nil)
	case proto.OptListMetaContext, proto.OptSetMetaContext:
		return nil, false, s.metaContext(c, opt, data, a)
	}
	return nil, false, reply(c, opt, proto.RepErrUnsup, nil)
}

// flags are the transmission flags for this client.
func (a *agreed) flags(x *export) uint16 {
	f := x.limits.Load().Flags
	if a.structured {
		f |= proto.SendDF
	}
	return f
}

// info answers INFO and GO; x is nil when the option failed in peace.
func (s *Server) info(c net.Conn, opt uint32, data []byte, a *agreed) (*export, error) {
	if len(data) < 6 {
		return nil, reply(c, opt, proto.RepErrInvalid, nil)
	}
	n := int64(be.Uint32(data))
	if n > int64(len(data)-6) || n > proto.MaxString {
		return nil, reply(c, opt, proto.RepErrInvalid, nil)
	}
	name, infos := string(data[4:4+n]), data[4+n:]
	count := int(be.Uint16(infos))
	if infos = infos[2:]; len(infos) != 2*count {
		return nil, reply(c, opt, proto.RepErrInvalid, nil)
	}
	x := s.find(name)
	if x == nil {
		return nil, reply(c, opt, proto.RepErrUnknown, []byte("no such export"))
	}
	g := x.Device.Geometry()
	send := func(typ uint16, fields ...any) error {
		b := binary.BigEndian.AppendUint16(nil, typ)
		for _, f := range fields {
			switch v := f.(type) {
			case uint64:
				b = be.AppendUint64(b, v)
			case uint32:
				b = be.AppendUint32(b, v)
			case uint16:
				b = be.AppendUint16(b, v)
			case string:
				b = append(b, v...)
			}
		}
		return reply(c, opt, proto.RepInfo, b)
	}
	if err := send(proto.InfoExport, uint64(x.limits.Load().Size), a.flags(x)); err != nil {
		return nil, err
	}
	preferred := max(4096, g.PhysicalBlock, g.BlockSize)
	if g.OptimalIO > preferred && g.OptimalIO <= 1<<20 && g.OptimalIO&(g.OptimalIO-1) == 0 {
		preferred = g.OptimalIO
	}
	if err := send(proto.InfoBlockSize, uint32(g.BlockSize), uint32(preferred), uint32(proto.MaxPayload)); err != nil {
		return nil, err
	}
	for ; len(infos) > 0; infos = infos[2:] {
		var err error
		switch be.Uint16(infos) {
		case proto.InfoName:
			err = send(proto.InfoName, x.Name)
		case proto.InfoDescription:
			err = send(proto.InfoDescription, x.Description)
		}
		if err != nil {
			return nil, err
		}
	}
	return x, reply(c, opt, proto.RepAck, nil)
}
