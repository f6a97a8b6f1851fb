package kernel

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/u-root/iscsinl"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// sysfs makes a tree of files and links (-> target) the sysfs of the test.
func sysfs(t *testing.T, files map[string]string) {
	root := t.TempDir()
	for name, content := range files {
		file := filepath.Join(root, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		if to, ok := strings.CutPrefix(content, "-> "); ok {
			require.NoError(t, os.Symlink(filepath.Join(root, to), file))
			continue
		}
		require.NoError(t, os.WriteFile(file, []byte(content), 0o644))
	}
	was := sysRoot
	sysRoot = root
	t.Cleanup(func() { sysRoot = was })
}

const disk = "devices/platform/host3/session7/target3:0:0/3:0:0:1/block/sdb"

func TestALocalDiskOfAnISCSISessionIsPlacedAtItsTarget(t *testing.T) {
	sysfs(t, map[string]string{
		"dev/block/8:16": "-> " + disk, disk + "/device/vendor": "LIO-ORG", disk + "/sdb1/partition": "1", "dev/block/8:17": "-> " + disk + "/sdb1",
		"dev/block/8:32": "-> devices/pci0/host0/target0:0:5/0:0:5:2/block/sdc",
		"devices/pci0/host0/target0:0:5/0:0:5:2/block/sdc/device/vendor": "SEAGATE",
		"dev/block/7:0": "-> devices/virtual/block/loop0", "devices/virtual/block/loop0/size": "0",
		"class/iscsi_session/session7/targetname":                 "iqn.2009-01.nl.pref:storage\n",
		"class/iscsi_connection/connection7:0/persistent_address": "fe80::1\n", "class/iscsi_connection/connection7:0/persistent_port": "3260\n",
	})
	dir, err := sysfsOf("/dev/sdb", 8, 16)
	require.NoError(t, err)
	require.Equal(t, Place{Portal: "[fe80::1]:3260", Target: "iqn.2009-01.nl.pref:storage", LUN: 1}, placeIn(dir))
	dir, err = sysfsOf("/dev/sdc", 8, 32)
	require.NoError(t, err)
	require.Equal(t, Place{Portal: "0:0:5:2", LUN: 2}, placeIn(dir))
	_, err = sysfsOf("/dev/sdb1", 8, 17)
	require.ErrorContains(t, err, "partition: name its whole disk, /dev/sdb")
	_, err = sysfsOf("/dev/loop0", 7, 0)
	require.ErrorContains(t, err, "no SCSI ID")
}

func TestFilesThatAreNoDiskAreRefused(t *testing.T) {
	for file, text := range map[string]string{"/dev/no-such-disk": "does not exist", "/dev/null": "no block device", t.TempDir(): "no block device"} {
		_, err := Inquire(t.Context(), file)
		require.ErrorContains(t, err, text)
	}
}

func TestOnlySessionsOfCrashedRunsAreLeftovers(t *testing.T) {
	isid := [6]byte{0x80, 1, 2, 3, 4, 0xff}
	dead := "mpathd-8001020304ff-1-0" // process 1 began at another time
	sysfs(t, map[string]string{
		"class/iscsi_session/session1/ifacename": mark(isid) + "\n", // of this very process
		"class/iscsi_session/session2/ifacename": "default\n",       // of open-iscsi
		"class/iscsi_session/session3/ifacename": dead + "\n", "class/iscsi_session/session3/targetname": "iqn.2026-11.example:t\n",
		"class/iscsi_session/session4/ifacename": "mpathd-8001020304ff-1\n", "class/iscsi_session/session5/ifacename": "mpathd-xyz-1-0\n",
		"class/iscsi_session/session6/ifacename": "(null)\n", "class/iscsi_session/session7/ifacename": dead + "\n",
	})
	events.mu.Lock()
	events.ours[7] = &watched{}
	events.mu.Unlock()
	defer func() { events.mu.Lock(); delete(events.ours, 7); events.mu.Unlock() }()
	require.Equal(t, []leftover{{sid: 3, isid: isid, target: "iqn.2026-11.example:t"}}, leftovers())
}

// event is a struct iscsi_uevent as the kernel sends it.
func event(kind uint32, answer ...uint32) []byte {
	b := make([]byte, eventLen)
	binary.NativeEndian.PutUint32(b, kind)
	for i, v := range answer {
		binary.NativeEndian.PutUint32(b[eventAnswer+4*i:], v)
	}
	return b
}

func TestEventsOfTheKernelEndOnlyTheirOwnSession(t *testing.T) {
	async := func(code byte) []byte {
		var h pdu.Header
		h[0], h[36] = uint8(pdu.OpAsync), code
		return append(event(eventRecvPDU, 5, 0), h[:]...)
	}
	for name, c := range map[string]struct {
		event []byte
		cause string
	}{
		"connection closed":        {event(eventError, 5, 0, uint32(iscsinl.ISCSI_ERR_TCP_CONN_CLOSE)), "connection was closed"},
		"unknown error":            {event(eventError, 5, 0, 4711), "4711"},
		"error of another session": {event(eventError, 6, 0, 1011), ""},
		"destroyed":                {event(eventGone, 3, 5), "somebody else"},
		"another one destroyed":    {event(eventGone, 5, 3), ""},
		"logout request":           {async(pdu.AsyncLogoutRequest), "asked us to log out"},
		"drop":                     {async(pdu.AsyncDropSession), "drops the session"},
		"vendor event":             {async(255), ""},
		"cut PDU":                  {async(1)[:eventLen+10], ""},
		"cut event":                {event(eventError, 5)[:eventLen-1], ""},
		"nothing":                  {nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSession(Options{FailoverTime: time.Hour}, newFake(1), "/dev/fake", bs)
			s.start()
			w := &watched{loggedOut: make(chan struct{})}
			w.attach(s)
			h := hub{ours: map[uint32]*watched{5: w}}
			h.take(c.event)
			if c.cause == "" {
				require.NoError(t, s.Err())
				s.Abort(errClosed)
			} else {
				require.ErrorContains(t, s.Err(), c.cause)
			}
			<-s.released
		})
	}
}

func TestAnErrorDuringTheHandOverEndsTheSessionThatFollows(t *testing.T) {
	w := &watched{loggedOut: make(chan struct{})}
	h := hub{ours: map[uint32]*watched{5: w}}
	h.take(event(eventError, 5, 0, uint32(iscsinl.ISCSI_ERR_CONN_FAILED)))
	s := newSession(Options{}, newFake(1), "/dev/fake", bs)
	s.start()
	w.attach(s)
	require.ErrorContains(t, s.Err(), "connection failed")
	<-s.released
}

func TestTheKernelNumbersLUNsItsOwnWay(t *testing.T) {
	require.EqualValues(t, 5, kernelLUN(scsi.LUNFromNumber(5)))
	require.EqualValues(t, 0x4000+300, kernelLUN(scsi.LUNFromNumber(300)))
	require.EqualValues(t, 0x00020001, kernelLUN([8]byte{0, 1, 0, 2}))
}

func TestTheKernelIsToldWhatTheLoginNegotiated(t *testing.T) {
	c := &initiator.Config{Address: "[::1]:3261", TargetName: "iqn.t", InitiatorName: "iqn.i", Credentials: initiator.Credentials{User: "u", Secret: "topsecretword"}}
	l := &initiator.Login{Params: initiator.Params{MaxR2T: 3, DataDigest: true, ImmediateData: true, TargetMaxData: 8192, FirstBurst: 65536, MaxBurst: 262144}, MaxData: 262144, ExpStatSN: 0xfffffff0, TargetPortalGroup: 7}
	got := map[iscsinl.IscsiParam]string{}
	for _, p := range parameters(c, l) {
		require.NotContains(t, got, p.name)
		require.NotContains(t, p.value, "topsecretword")
		got[p.name] = p.value
	}
	for name, want := range map[iscsinl.IscsiParam]string{
		iscsinl.ISCSI_PARAM_MAX_R2T: "4", iscsinl.ISCSI_PARAM_HDRDGST_EN: "0", iscsinl.ISCSI_PARAM_DATADGST_EN: "1", iscsinl.ISCSI_PARAM_INITIAL_R2T_EN: "0",
		iscsinl.ISCSI_PARAM_IMM_DATA_EN: "1", iscsinl.ISCSI_PARAM_MAX_XMIT_DLENGTH: "8192", iscsinl.ISCSI_PARAM_MAX_RECV_DLENGTH: "262144", iscsinl.ISCSI_PARAM_EXP_STATSN: "4294967280",
		iscsinl.ISCSI_PARAM_TPGT: "7", iscsinl.ISCSI_PARAM_PERSISTENT_ADDRESS: "::1", iscsinl.ISCSI_PARAM_PERSISTENT_PORT: "3261", iscsinl.ISCSI_PARAM_SESS_RECOVERY_TMO: "0",
	} {
		require.Equal(t, want, got[name], "%v", name)
	}
}

func TestWithoutTheModuleTheErrorSaysWhatToLoad(t *testing.T) {
	sysfs(t, nil)
	require.ErrorContains(t, Available(), "modprobe iscsi_tcp")
	_, err := NewISCSI([8]byte{}).Open(t.Context(), initiator.Config{Address: "127.0.0.1:1", TargetName: "iqn.t"})
	require.ErrorContains(t, err, "modprobe iscsi_tcp")
}

func TestALoginOverSomethingElseThanTCPIsNotHandedOver(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	_, err := handOver(&initiator.Config{}, &initiator.Login{Conn: a})
	require.ErrorContains(t, err, fmt.Sprintf("%T", a))
}
