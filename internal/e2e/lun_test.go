package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/nbd/client"
)

// A unit above 255, in flat space addressing, and one that is named by the raw
// bytes of that addressing although its number is small.
func TestUnitsByNumberAndByRawBytes(t *testing.T) {
	t.Parallel()
	d, c := lone(t)
	image := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 32<<20))
	d.adm("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "300", "-b", image)
	found, err := exec.Command(binary, "discover", c.Address).CombinedOutput()
	require.NoError(t, err, "%s", found)
	require.Contains(t, string(found), d.iqn+"/1  # 64M")
	require.Contains(t, string(found), d.iqn+"/300  # 32M")

	dir := t.TempDir()
	s := &stack{t: t, control: filepath.Join(dir, "c")}
	base := "iscsi://" + c.Address + "/" + d.iqn
	s.cmd = exec.Command(binary, "run", "--attach", "none", "--control", s.control, "--nbd", "unix:"+filepath.Join(dir, "n"), "--initiator", c.InitiatorName, base+"/300", base+"/0x4001000000000000")
	s.cmd.Stderr = &s.log
	require.NoError(t, s.cmd.Start())
	t.Cleanup(func() {
		s.cmd.Process.Signal(syscall.SIGTERM)
		s.cmd.Wait()
		if t.Failed() {
			t.Logf("mpathd says:\n%s", s.log.String())
		}
	})
	s.await("two maps", func(m daemon.Maps) bool {
		return len(m.Maps) == 2 && m.Maps[0].Paths.Usable == 1 && m.Maps[1].Paths.Usable == 1
	})
	for _, m := range s.maps().Maps {
		p := m.Groups[0].Paths[0]
		want, at := "/300", image
		if m.Size == 64<<20 {
			want, at = "/0x4001000000000000", d.image
		}
		require.Equal(t, c.Address+want, p.Name)
		require.Equal(t, base+want, p.URL)
		cl, err := client.Dial("unix", filepath.Join(dir, "n"), m.Alias)
		require.NoError(t, err)
		data := bytes.Repeat([]byte(fmt.Sprintf("%-16s", want[:4])), 256)
		_, err = cl.WriteAt(data, 8192)
		require.NoError(t, err)
		require.NoError(t, cl.Flush())
		require.NoError(t, cl.Close())
		b, err := os.ReadFile(at)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, b[8192:][:len(data)]), "written to another unit")
	}
	shown, err := exec.Command(binary, "show", "paths", "--control", s.control).CombinedOutput()
	require.NoError(t, err)
	require.Equal(t, 1, strings.Count(string(shown), "0x4001000000000000"), "%s", shown)

	out, err := exec.Command(binary, "wwid", base+"/301").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "LUN 301 does not exist")
}
