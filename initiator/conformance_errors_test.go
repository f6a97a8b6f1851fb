package initiator_test

import (
	"fmt"
	"testing"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// Malformed PDUs: HM.
var errorCases = map[string]conformanceCase{
	"HM04": {"announces more sense than it sends", "drops", func(t *testing.T) {
		for _, more := range []int{1, 2, 3, 250, 0xffff - 18} {
			t.Run(fmt.Sprint(more), readDrops("bytes of sense", func(r *raw, itt uint32) {
				var h pdu.Header
				h[0], h[1] = uint8(pdu.OpSCSIResponse), pdu.Final
				h.SetITT(itt)
				h.SetStatus(2)
				n := 18 + more
				r.send(h, append([]byte{byte(n >> 8), byte(n)}, fixedSense(3, 0x11, 0)...), true)
			}))
		}
	}},
	"HM05": {"answers an older use of a tag", "drops, the new task stays", readDrops("unknown task tag", func(r *raw, itt uint32) { r.good(itt+1<<16, nil) })},
	"HM07": {"jumps with StatSN", "drops", readDrops("StatSN", func(r *raw, itt uint32) { r.statSN += 1 << 31; r.good(itt, nil) })},
}
