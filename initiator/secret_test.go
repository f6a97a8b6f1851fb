package initiator_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
)

func TestSecretFileIsForItsOwnerAlone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	for text, want := range map[string]string{"elephants-over-alps\n": "elephants-over-alps", "elephants-over-alps": "elephants-over-alps", " spaces count \r\n": " spaces count "} {
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		s, err := initiator.ReadSecret(file)
		require.NoError(t, err)
		require.Equal(t, initiator.Secret(want), s)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o601} {
		require.NoError(t, os.Chmod(file, mode))
		_, err := initiator.ReadSecret(file)
		require.ErrorContains(t, err, "chmod 600 "+file, "%o", mode)
	}
	require.NoError(t, os.Chmod(file, 0o600))
	if os.Geteuid() == 0 {
		require.NoError(t, os.Chown(file, 12345, 0))
		_, err := initiator.ReadSecret(file)
		require.ErrorContains(t, err, "belongs to user 12345")
	}
	for name, text := range map[string]string{"empty": "\n", "more than one line": "one\ntwo\n", "at most 1024": strings.Repeat("x", 1025)} {
		bad := filepath.Join(t.TempDir(), "bad")
		require.NoError(t, os.WriteFile(bad, []byte(text), 0o600))
		_, err := initiator.ReadSecret(bad)
		require.ErrorContains(t, err, name)
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	require.NoError(t, syscall.Mkfifo(pipe, 0o600))
	_, err := initiator.ReadSecret(pipe)
	require.ErrorContains(t, err, "not a regular file")
	_, err = initiator.ReadSecret(filepath.Join(t.TempDir(), "none"))
	require.ErrorIs(t, err, syscall.ENOENT)
}

func TestSecretsPrintAsNothing(t *testing.T) {
	const secret = "elephants-over-alps"
	c := initiator.Config{Credentials: initiator.Credentials{User: "hannibal", Secret: secret, MutualSecret: "rome-wasnt-built"}}
	u, err := initiator.ParseURL("iscsi://hannibal%" + secret + "@10.0.0.1/iqn.a:b/0")
	require.NoError(t, err)
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "config", c.Credentials, "secret", c.Secret, "url", u)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "config", c.Credentials, "secret", c.Secret, "url", u)
	b, err := json.Marshal(c.Credentials)
	require.NoError(t, err)
	all := log.String() + string(b) + fmt.Sprintf("%v %+v %#v %s %q %x", c, c.Credentials, c.Credentials, u, c.Secret, c.Secret)
	require.NotContains(t, all, secret)
	require.NotContains(t, all, "rome-wasnt-built")
	require.NotContains(t, all, fmt.Sprintf("%x", secret))
	require.Contains(t, all, "hannibal")
}
