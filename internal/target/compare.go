package target

import (
	"bytes"
	"encoding/binary"
)

// compareAndWrite is COMPARE AND WRITE of one block (SBC-3 5.2): p is what must
// be there and what to put in its place, and nothing comes in between.
func compareAndWrite(lu *LU, cdb *[16]byte, p []byte) Sense {
	lba, bs := binary.BigEndian.Uint64(cdb[2:]), lu.blockSize
	switch {
	case cdb[13] == 0:
		return noSense
	case cdb[13] > 1 || cdb[1]>>5 != 0: // more than page B0 could allow; protection
		return errField
	case lba >= lu.size.Load()>>lu.shift:
		return errRange
	case lu.readOnly.Load():
		return errWriteProtect
	case len(p) < 2*bs:
		return errParamLength
	}
	off := lba << lu.shift
	c, in := lu.at(off>>chunkShift), int(off&(chunkSize-1))
	c.mu.Lock()
	defer c.mu.Unlock()
	if !bytes.Equal(c.data[in:in+bs], p[:bs]) {
		return errMiscompare
	}
	copy(c.data[in:], p[bs:2*bs])
	return noSense
}
