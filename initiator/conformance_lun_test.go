package initiator_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

// How commands are addressed and what they announce.
var lunCases = map[string]conformanceCase{
	"FF14": {"has units 0, 255, 256 in flat space addressing, and ones that it reports in other forms of eight bytes", "sends each LUN as it was named or reported, in commands, data and task management; EDTL and the flags R and W as the data has it", func(t *testing.T) {
		t.Run("on the wire", encodings)
		t.Run("unit 300 of a target, flat 1 too", highUnits)
		t.Run("1500 units", manyUnits)
	}},
}

func encodings(t *testing.T) {
	for text, lun := range map[string][8]byte{"0": {}, "255": {0, 255}, "256": {0x41, 0}, "16383": {0x7f, 0xff}, "0x4001000000000000": {0x40, 1}, "0x0102000000000000": {1, 2},
		"0xd2000001abcdef01": {0xd2, 0, 0, 1, 0xab, 0xcd, 0xef, 1}} {
		t.Run(text, func(t *testing.T) {
			u, err := initiator.ParseURL("iscsi://a/" + iqn + "/" + text)
			require.NoError(t, err)
			require.Equal(t, lun, u.LUN)
			require.Equal(t, "iscsi://a:3260/"+iqn+"/"+text, u.String())
			require.Equal(t, "a:3260/"+text, u.PathName())
			s := logsIn(t, func(r *raw) {
				r.login("InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", "65536")
				for range 4 {
					h, _, _ := r.command()
					want := map[uint8]struct {
						flags uint8
						edtl  uint32
					}{scsi.OpTestUnitReady: {0, 0}, scsi.OpRead16: {pdu.CmdRead, 4096}, scsi.OpWrite16: {pdu.CmdWrite, 8192}, scsi.OpInquiry: {pdu.CmdRead, 255}}[h.CDB()[0]]
					assert.Equal(t, lun, h.LUN())
					assert.Equal(t, pdu.Final|pdu.AttrSimple|want.flags, h.Flags(), "opcode %#02x", h.CDB()[0])
					assert.Equal(t, want.edtl, h.EDTL(), "opcode %#02x", h.CDB()[0])
					if h.CDB()[0] == scsi.OpWrite16 {
						q := nopIn(h.ITT(), 5)
						q[0] = uint8(pdu.OpR2T)
						q.SetLUN(lun)
						q.SetStatSN(r.statSN)
						q.SetDesiredLen(8192)
						r.send(q, nil, false)
						d, _, _ := r.read()
						assert.Equal(t, pdu.OpDataOut, d.Opcode())
						assert.Equal(t, lun, d.LUN())
					}
					if want.flags == pdu.CmdRead {
						r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern[:want.edtl])
					} else {
						r.good(h.ITT(), nil)
					}
				}
				h, _, _ := r.read()
				assert.Equal(t, pdu.OpTaskMgmtReq, h.Opcode())
				assert.Equal(t, lun, h.LUN())
				r.taskDone(h, pdu.TMFComplete)
				r.drain()
			})
			ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
			defer cancel()
			var read, write scsi.CDB
			scsi.Read(&read, 0, 8, true)
			scsi.Write(&write, 0, 16, false, true)
			for _, c := range []*initiator.Command{{}, {CDB: read, Dir: initiator.DataIn, Data: make([]byte, 4096)}, {CDB: write, Dir: initiator.DataOut, Data: make([]byte, 8192)},
				{CDB: scsi.Inquiry(false, 0, 255), Dir: initiator.DataIn, Data: make([]byte, 255)}} {
				c.LUN = u.LUN
				require.NoError(t, s.Do(ctx, c))
			}
			require.NoError(t, s.LUReset(ctx, u.LUN))
		})
	}
}

// unitsOf is a session to a target of our own with these units.
func unitsOf(t *testing.T, numbers ...int) (*initiator.Session, map[int]*target.LU) {
	t.Helper()
	lus, by := make([]*target.LU, numbers[len(numbers)-1]+1), map[int]*target.LU{}
	for _, n := range numbers {
		lu, err := target.NewLU(1<<20, 512, target.DefaultIdentity("units"))
		require.NoError(t, err)
		lus[n], by[n] = lu, lu
	}
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: lus}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	p, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	s, err := initiator.Open(context.Background(), initiator.Config{Address: p.Addr(), TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", ISID: [6]byte{0x80, 5}, LoginTimeout: 10 * time.Second})
	require.NoError(t, err)
	t.Cleanup(func() { s.Close(context.Background()) })
	return s, by
}

func highUnits(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	s, by := unitsOf(t, 0, 1, 255, 256, 300)
	luns, err := initiator.ReportLUNs(ctx, s)
	require.NoError(t, err)
	var texts []string
	for _, l := range luns {
		texts = append(texts, scsi.LUNText(l))
	}
	require.Equal(t, []string{"0", "1", "255", "256", "300"}, texts)
	for text, n := range map[string]int{"1": 1, "255": 255, "300": 300, "0x4001000000000000": 1, "0x4000000000000000": 0} {
		lun, err := scsi.ParseLUN(text)
		require.NoError(t, err)
		info, err := initiator.Identify(ctx, s, lun)
		require.NoError(t, err, text)
		require.EqualValues(t, 1<<20, info.Size())
		c := &initiator.Command{LUN: lun, Dir: initiator.DataOut, Data: []byte(pattern[:512])}
		scsi.Write(&c.CDB, uint64(n), 1, false, true)
		require.NoError(t, s.Do(ctx, c))
		got := make([]byte, 512)
		by[n].ReadAt(got, int64(n)*512)
		require.Equal(t, pattern[:512], got, text)
	}
	for _, text := range []string{"2", "257", "0x0100000000000000", "0xc101000000000000"} {
		lun, err := scsi.ParseLUN(text)
		require.NoError(t, err)
		_, err = initiator.Identify(ctx, s, lun)
		require.ErrorContains(t, err, "LUN "+text+" does not exist")
	}
}

// manyUnits are more than one REPORT LUNS of the usual length tells.
func manyUnits(t *testing.T) {
	numbers := make([]int, 1500)
	for i := range numbers {
		numbers[i] = i
	}
	s, _ := unitsOf(t, numbers...)
	luns, err := initiator.ReportLUNs(context.Background(), s)
	require.NoError(t, err)
	require.Len(t, luns, 1500)
	require.Equal(t, scsi.LUNFromNumber(1499), luns[1499])
}
