package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/realtarget"
	"github.com/mpathd/mpathd/paths"
	"github.com/mpathd/mpathd/scsi"
	"github.com/stretchr/testify/require"
)

// lone is one tgtd with one unit and no daemon.
func lone(t *testing.T) (*tgtd, initiator.Config) {
	realtarget.Need(t, "tgtd", "tgtadm")
	image := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 64<<20))
	port := realtarget.FreePort(t)
	d := &tgtd{t: t, control: port, port: port, image: image, iqn: "iqn.2009-01.nl.pref:storage.lone"}
	d.start()
	t.Cleanup(d.kill)
	return d, initiator.Config{Address: fmt.Sprintf("127.0.0.1:%d", port), TargetName: d.iqn, InitiatorName: "iqn.2006-07.com.example.intra:hannibal", ISID: [6]byte{0x80, 1}}
}

func login(c initiator.Config) error {
	s, err := initiator.Open(context.Background(), c)
	if err != nil {
		return err
	}
	return s.Close(context.Background())
}

func TestCHAPAgainstTgtd(t *testing.T) {
	t.Parallel()
	d, c := lone(t)
	d.adm("--op", "new", "--mode", "account", "--user", "hannibal", "--password", "elephants-over-alps")
	d.adm("--op", "bind", "--mode", "account", "--tid", "1", "--user", "hannibal")
	require.ErrorContains(t, login(c), "set a CHAP user and secret")
	c.User, c.Secret = "hannibal", "wrong-secret-here"
	require.ErrorContains(t, login(c), "authentication failed")
	c.Secret = "elephants-over-alps"
	require.NoError(t, login(c))

	c.MutualUser, c.MutualSecret = "storage", "rome-wasnt-built"
	require.Error(t, login(c), "the target has no outgoing account: it cannot prove itself")
	d.adm("--op", "new", "--mode", "account", "--user", "storage", "--password", "rome-wasnt-built")
	d.adm("--op", "bind", "--mode", "account", "--tid", "1", "--user", "storage", "--outgoing")
	require.NoError(t, login(c))
	c.MutualSecret = "carthage-must-fall"
	err := login(c)
	require.ErrorContains(t, err, "does not know the mutual secret")
	require.NotContains(t, err.Error(), "carthage")
	c.MutualSecret = c.Secret
	require.ErrorContains(t, login(c), "same secret")
	c.MutualUser, c.MutualSecret = "somebody", "rome-wasnt-built"
	require.ErrorContains(t, login(c), `calls itself "storage"`)
}

// moves writes and reads back sizes from one block to 4 MiB, and odd numbers
// of blocks.
func moves(t *testing.T, s *initiator.Session) {
	for i, size := range []int{512, 1536, 4096, 8192, 65536, 66048, 1 << 20, 4 << 20} {
		data := make([]byte, size)
		rand.Read(data)
		lba := uint64(i * 8192)
		w := &initiator.Command{LUN: scsi.LUNFromNumber(1), Dir: initiator.DataOut, Data: data}
		scsi.Write(&w.CDB, lba, uint32(size/512), false, true)
		require.NoError(t, s.Do(context.Background(), w))
		require.Equal(t, scsi.StatusGood, w.Result.Status, "%d bytes", size)
		r := &initiator.Command{LUN: scsi.LUNFromNumber(1), Dir: initiator.DataIn, Data: make([]byte, size)}
		scsi.Read(&r.CDB, lba, uint32(size/512), true)
		require.NoError(t, s.Do(context.Background(), r))
		require.Equal(t, scsi.StatusGood, r.Result.Status)
		require.True(t, bytes.Equal(data, r.Data), "%d bytes came back otherwise", size)
	}
}

func TestDigestsAgainstTgtd(t *testing.T) {
	t.Parallel()
	d, c := lone(t)
	for _, k := range []string{"HeaderDigest", "DataDigest"} {
		d.adm("--op", "update", "--mode", "target", "--tid", "1", "-n", k, "-v", "CRC32C,None")
	}
	policy := map[bool]initiator.Digest{false: initiator.DigestNone, true: initiator.DigestRequired}
	for _, digests := range [][2]bool{{true, false}, {false, true}, {true, true}} {
		c.HeaderDigest, c.DataDigest = policy[digests[0]], policy[digests[1]]
		s, err := initiator.Open(context.Background(), c)
		require.NoError(t, err)
		p := s.Negotiated()
		require.Equal(t, digests, [2]bool{p.HeaderDigest, p.DataDigest})
		_, err = initiator.Identify(context.Background(), s, scsi.LUNFromNumber(1))
		require.NoError(t, err)
		moves(t, s)
		time.Sleep(1200 * time.Millisecond) // pings carry digests too
		require.NoError(t, s.Err())
		s.Abort(errors.New("end"))
		<-s.Done()
	}
	d.adm("--op", "update", "--mode", "target", "--tid", "1", "-n", "HeaderDigest", "-v", "None")
	c.HeaderDigest, c.DataDigest = initiator.DigestRequired, initiator.DigestNone
	require.ErrorContains(t, login(c), "does not do CRC32C as HeaderDigest")
}

// Every combination of InitialR2T and ImmediateData, and small bursts.
func TestBurstsAgainstTgtd(t *testing.T) {
	t.Parallel()
	d, c := lone(t)
	for _, r2t := range []string{"Yes", "No"} {
		for _, immediate := range []string{"Yes", "No"} {
			for _, burst := range []string{"4096", "65536"} {
				for k, v := range map[string]string{"InitialR2T": r2t, "ImmediateData": immediate, "FirstBurstLength": burst, "MaxBurstLength": "131072", "MaxRecvDataSegmentLength": "8192"} {
					d.adm("--op", "update", "--mode", "target", "--tid", "1", "-n", k, "-v", v)
				}
				s, err := initiator.Open(context.Background(), c)
				require.NoError(t, err)
				p := s.Negotiated()
				require.Equal(t, r2t == "Yes", p.InitialR2T)
				require.Equal(t, immediate == "Yes", p.ImmediateData)
				_, err = initiator.Identify(context.Background(), s, scsi.LUNFromNumber(1))
				require.NoError(t, err)
				moves(t, s)
				s.Abort(errors.New("end"))
				<-s.Done()
			}
		}
	}
}

// A secret that was corrected, and one that was changed while its paths serve, is
// what the next login uses.
func TestReconfigureAppliesSecretsAgainstTgtd(t *testing.T) {
	t.Parallel()
	tgt, c := lone(t)
	account := func(secret string) {
		tgt.adm("--op", "new", "--mode", "account", "--user", "hannibal", "--password", secret)
		tgt.adm("--op", "bind", "--mode", "account", "--tid", "1", "--user", "hannibal")
	}
	account("elephants-over-alps")
	with := func(secret initiator.Secret) daemon.Reloaded {
		u, err := initiator.ParseURL("iscsi://hannibal@" + c.Address + "/" + c.TargetName + "/1")
		require.NoError(t, err)
		u.Credentials = initiator.Credentials{User: "hannibal", Secret: secret}
		return daemon.Reloaded{Targets: []initiator.URL{u}, Resolve: func(*initiator.LUInfo) (paths.Config, string, error) {
			return paths.Config{Alias: "m", NoPathRetry: paths.Queue}, "", nil
		}}
	}
	dir, next := t.TempDir(), with("wrong-secret-here")
	d, err := daemon.Start(daemon.Options{Targets: next.Targets, Resolve: next.Resolve, InitiatorName: c.InitiatorName, NBD: "unix:" + filepath.Join(dir, "n"), Control: filepath.Join(dir, "c"),
		Reload: func() (daemon.Reloaded, error) { return next, nil }})
	require.NoError(t, err)
	defer d.Stop(context.Background())
	usable := func() bool { s := d.Snapshot(); return len(s.Maps) == 1 && s.Maps[0].Paths.Usable == 1 }
	require.Eventually(t, func() bool {
		s := d.Snapshot()
		return len(s.Pending) == 1 && strings.Contains(s.Pending[0].Cause, "authentication failed")
	}, 30*time.Second, 10*time.Millisecond)
	next = with("elephants-over-alps")
	require.NoError(t, d.Reconfigure())
	require.Eventually(t, usable, 10*time.Second, 10*time.Millisecond, "the corrected secret is not used")

	path := d.Snapshot().Maps[0].Groups[0].Paths[0].Name
	require.NoError(t, d.FailPath(path))
	require.Eventually(t, func() bool { return !usable() }, 10*time.Second, 10*time.Millisecond)
	tgt.adm("--op", "unbind", "--mode", "account", "--tid", "1", "--user", "hannibal")
	tgt.adm("--op", "delete", "--mode", "account", "--user", "hannibal")
	account("carthage-must-fall")
	next = with("carthage-must-fall")
	require.NoError(t, d.Reconfigure())
	require.NoError(t, d.ReinstatePath(path))
	require.Eventually(t, usable, 10*time.Second, 10*time.Millisecond, "the changed secret is not used")
}
