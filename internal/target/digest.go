package target

import (
	"strings"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// digests says which PDUs carry CRC32C (RFC 7143 13.1).
type digests struct{ header, data bool }

// chooseDigest picks the first value of an initiator's list that there is
// (RFC 7143 6.2.1).
func chooseDigest(list string) string {
	for v := range strings.SplitSeq(list, ",") {
		if v == "None" || v == "CRC32C" {
			return v
		}
	}
	return "Reject"
}

// ofHeader is how many bytes of digest follow a header.
func (d digests) ofHeader() int {
	if d.header {
		return pdu.DigestLen
	}
	return 0
}

// ofData is how many bytes of digest follow a data segment of n bytes.
func (d digests) ofData(n int) int {
	if d.data && n > 0 {
		return pdu.DigestLen
	}
	return 0
}

// intact tells whether b[n:end] is the digest of b[:n], if there is one.
func (d digests) intact(b []byte, n, end int) bool {
	return n == end || pdu.TakeDigest(b[n:end]) == pdu.CRC32C(0, b[:n])
}

// sum continues a data digest over b.
func (d digests) sum(sum uint32, b []byte) uint32 {
	if d.data {
		return pdu.CRC32C(sum, b)
	}
	return 0
}

// seal writes the digest of the header in the output that is complete by now.
func (c *conn) seal() {
	if c.open >= 0 {
		b := c.out[c.open:]
		pdu.PutDigest(b[pdu.HeaderLen:], pdu.CRC32C(0, b[:pdu.HeaderLen]))
		c.open = -1
	}
}

// endPayload appends what follows n bytes of data: padding and, sum being
// that of the data, their digest.
func (c *conn) endPayload(n int, sum uint32) {
	b := c.room(pdu.Pad(n) + c.digests.ofData(n))
	pad := b[:pdu.Pad(n)]
	clear(pad)
	if len(b) > len(pad) {
		pdu.PutDigest(b[len(pad):], c.digests.sum(sum, pad))
	}
}

// dataDigestError rejects a PDU whose data was damaged on its way and ends the
// connection, the recovery of level 0 (RFC 7143 7.8).
func (c *conn) dataDigestError(h *pdu.Header) bool {
	c.rejectPDU(h, pdu.RejectDataDigest)
	c.flush()
	return c.fail("data digest error", h)
}
