package pdu

import (
	"encoding/binary"
	"hash/crc32"
)

// DigestLen is the length of a header or data digest in bytes.
const DigestLen = 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC32C continues a digest (RFC 7143 13.1) over b; sum is that of the bytes
// before b, 0 if there are none.
func CRC32C(sum uint32, b []byte) uint32 { return crc32.Update(sum, castagnoli, b) }

// PutDigest writes a digest to b as it goes over the wire: RFC 7143 A.4 has its
// bytes in this order.
func PutDigest(b []byte, sum uint32) { binary.LittleEndian.PutUint32(b, sum) }

// TakeDigest reads what PutDigest writes.
func TakeDigest(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
