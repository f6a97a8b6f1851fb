package simulate

import (
	"bytes"
	"encoding/binary"

	"github.com/mpathd/mpathd/scsi"
)

const blockSize = 512 // bytes

// disk is the storage behind all servers. With one server its volatile cache
// is between view and stable; with two, a block that was not flushed is lost
// with the server that took it, unless the servers replicate.
type disk struct {
	w      *world
	view   []byte // what a read sees
	stable []byte // what outlives a power cut
	dirty  []*server
	execs  map[exec]int
}

// exec counts how often a write of a value to a block was executed.
type exec struct {
	block int
	value uint16
}

func newDisk(w *world, blocks int) *disk {
	return &disk{w: w, view: make([]byte, blocks*blockSize), stable: make([]byte, blocks*blockSize), dirty: make([]*server, blocks), execs: map[exec]int{}}
}

// fill makes n blocks of a value.
func fill(n int, v uint16) []byte {
	b := make([]byte, n*blockSize)
	for i := 0; i < len(b); i += 2 {
		binary.BigEndian.PutUint16(b[i:], v)
	}
	return b
}

// value is what a block holds; ok is false if it is torn.
func value(b []byte) (v uint16, ok bool) {
	v = binary.BigEndian.Uint16(b)
	return v, bytes.Equal(b, fill(1, v))
}

// write puts whole blocks on the disk through a server.
func (d *disk) write(s *server, lba int, data []byte, durable bool) {
	copy(d.view[lba*blockSize:], data)
	for i := range len(data) / blockSize {
		v, _ := value(data[i*blockSize : (i+1)*blockSize])
		d.execs[exec{lba + i, v}]++
		d.dirty[lba+i] = s
		if durable || !d.w.set.WriteCache {
			d.destage(lba + i)
		}
	}
}

func (d *disk) destage(i int) {
	copy(d.stable[i*blockSize:(i+1)*blockSize], d.view[i*blockSize:])
	d.dirty[i] = nil
}

// sync is SYNCHRONIZE CACHE at a server.
func (d *disk) sync(s *server) {
	for i, by := range d.dirty {
		if by == s || by != nil && d.w.set.Replicated {
			d.destage(i)
		}
	}
}

// lose is a power cut of a server.
func (d *disk) lose(s *server) {
	var other *server
	for _, o := range d.w.srv {
		if o != s && o.power && d.w.set.Replicated {
			other = o
		}
	}
	for i, by := range d.dirty {
		switch {
		case by != s:
		case other != nil:
			d.dirty[i] = other
		default:
			copy(d.view[i*blockSize:(i+1)*blockSize], d.stable[i*blockSize:])
			d.dirty[i] = nil
		}
	}
}

// naa is the SCSI ID that all servers show.
var naa = []byte{0x60, 0x26, 0xd7, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}

type sense [3]uint8 // key, ASC, ASCQ

var (
	noSense   = sense{}
	badOpcode = sense{5, 0x20, 0}
	badRange  = sense{5, 0x21, 0}
)

// answer executes a command other than a READ or a mutation.
func (d *disk) answer(s *server, cdb *[16]byte) ([]byte, sense) {
	be := binary.BigEndian
	blocks := len(d.dirty)
	switch cdb[0] {
	case 0x00: // TEST UNIT READY
		return nil, noSense
	case 0x12: // INQUIRY
		if cdb[1]&1 == 0 {
			b := make([]byte, 36)
			b[2], b[3], b[4] = 6, 2, 31
			copy(b[8:], "SIM     DISK            1   ")
			return b, noSense
		}
		switch cdb[2] {
		case 0x00:
			return []byte{0, 0, 0, 4, 0, 0x83, 0xb0, 0xb2}, noSense
		case 0x83:
			return append([]byte{0, 0x83, 0, 20, 1, 3, 0, 16}, naa...), noSense
		case 0xb0:
			b := make([]byte, 64)
			b[1], b[3] = 0xb0, 60
			be.PutUint32(b[8:], uint32(d.w.set.MaxTransfer))
			be.PutUint32(b[20:], uint32(d.w.set.MaxTransfer))
			be.PutUint32(b[24:], 1)
			be.PutUint64(b[36:], uint64(d.w.set.MaxTransfer))
			return b, noSense
		case 0xb2:
			return []byte{0, 0xb2, 0, 4, 0, 0xc0, 2, 0}, noSense
		}
	case 0x9e: // READ CAPACITY (16)
		if cdb[1]&0x1f == 0x10 {
			b := make([]byte, 32)
			be.PutUint64(b, uint64(blocks-1))
			be.PutUint32(b[8:], blockSize)
			b[14] = 0xc0 // LBPME, LBPRZ
			return b, noSense
		}
	case 0x1a: // MODE SENSE (6)
		b := []byte{23, 0, 0, 0, 0x08, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
		if d.w.set.FUA {
			b[2] = 0x10
		}
		if d.w.set.WriteCache {
			b[6] = 0x04
		}
		return b, noSense
	case scsi.OpSyncCache10, scsi.OpSyncCache16:
		d.sync(s)
		return nil, noSense
	}
	return nil, badOpcode
}
