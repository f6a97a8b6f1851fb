package initiator_test

import (
	"context"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/realtarget"
	"github.com/mpathd/mpathd/scsi"
)

// ended takes commands back.
type ended chan struct{}

func (e ended) Done(*initiator.Command, *block.Plug) { e <- struct{}{} }

// TestNoAllocationFromSubmitToDone counts those of the whole process, the
// session's goroutines included; the target is another one.
func TestNoAllocationFromSubmitToDone(t *testing.T) {
	const depth = 8
	for _, digests := range []bool{false, true} {
		params, want := map[string]string{}, initiator.DigestNone
		if digests {
			params, want = map[string]string{"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}, initiator.DigestRequired
		}
		g := realtarget.Start(t, "tgtd", realtarget.Options{Params: params})
		for _, c := range []struct {
			name  string
			size  int
			dir   initiator.Direction
			offer initiator.Offer
		}{
			{"read of 4 KiB", 4 << 10, initiator.DataIn, initiator.Offer{}},
			{"read of 512 KiB", 512 << 10, initiator.DataIn, initiator.Offer{}},
			{"write with immediate data", 4 << 10, initiator.DataOut, initiator.Offer{}},
			{"write with unsolicited data", 64 << 10, initiator.DataOut, initiator.Offer{NoImmediateData: true}},
			{"write with R2T", 256 << 10, initiator.DataOut, initiator.Offer{InitialR2T: true, NoImmediateData: true, MaxBurst: 64 << 10}},
			{"write with all of these", 512 << 10, initiator.DataOut, initiator.Offer{MaxBurst: 128 << 10}},
		} {
			name := c.name
			if digests {
				name += " and digests"
			}
			t.Run(name, func(t *testing.T) {
				s, err := initiator.Open(context.Background(), initiator.Config{Address: g.Portals()[0], TargetName: g.Name(), InitiatorName: "iqn.2006-07.com.example.intra:hannibal",
					ISID: [6]byte{0x80, 1}, HeaderDigest: want, DataDigest: want, Offer: c.offer})
				require.NoError(t, err)
				defer func() { s.Abort(errors.New("end of test")); <-s.Done() }()
				require.Equal(t, digests, s.Negotiated().HeaderDigest && s.Negotiated().DataDigest)
				lun := scsi.LUNFromNumber(g.LUN())
				info, err := initiator.Identify(context.Background(), s, lun)
				require.NoError(t, err)
				done := make(ended, depth)
				commands := make([]*initiator.Command, depth)
				for i := range commands {
					commands[i] = &initiator.Command{LUN: lun, Dir: c.dir, Data: make([]byte, c.size), Owner: done}
					lba, blocks := uint64(i*c.size/512), uint32(c.size/512)
					if c.dir == initiator.DataIn {
						scsi.Read(&commands[i].CDB, lba, blocks, info.Use16)
					} else {
						scsi.Write(&commands[i].CDB, lba, blocks, false, info.Use16)
					}
				}
				rounds := 25 // a timer of the watchdog may allocate less than once in that many
				if c.size > 64<<10 {
					rounds = 5
				}
				var plug block.Plug
				run := func() {
					for range rounds {
						for _, c := range commands {
							require.True(t, s.Submit(c, &plug))
						}
						plug.Flush()
						for range commands {
							<-done
						}
					}
				}
				run() // lists and buffers reach their size
				require.Zero(t, testing.AllocsPerRun(4, run), "per %d commands", depth*rounds)
				for _, c := range commands {
					require.NoError(t, c.Result.Err)
					require.Equal(t, scsi.StatusGood, c.Result.Status)
				}
			})
		}
	}
}
