package initiator

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"syscall"
)

// Secret is a CHAP secret, any bytes. Whatever prints, logs or marshals it
// shows that there is one, never what it is.
type Secret string

const hidden = "(secret)"

func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return hidden
}

// Format covers every verb of fmt.
func (s Secret) Format(f fmt.State, _ rune) { io.WriteString(f, s.String()) }

// MarshalText covers JSON and its like.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue covers slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Credentials are those of CHAP (RFC 7143 12.1.3). An empty User means none; with
// MutualSecret the target must prove itself too, as MutualUser if that is set.
type Credentials struct {
	User         string
	Secret       Secret
	MutualUser   string
	MutualSecret Secret
	Algorithms   Algorithms // offered; default all
	ShortSecrets bool       // accept secrets under 96 bits
}

const minSecret = 12 // bytes: 96 bits (RFC 7143 9.2.1)

// Check tells what makes the credentials useless or unsafe, in the words of
// the configuration.
func (c *Credentials) Check() error {
	short := func(s Secret) bool { return s != "" && len(s) < minSecret && !c.ShortSecrets }
	var err error
	switch {
	case c.User == "" && c.Secret == "" && c.MutualUser == "" && c.MutualSecret == "":
	case c.User != "" && c.Secret == "":
		err = fmt.Errorf("CHAP user %q has no secret: set chap_secret_file", c.User)
	case c.User == "" && c.Secret != "":
		err = errors.New("a CHAP secret without a user: set chap_user")
	case c.MutualSecret != "" && c.Secret == "":
		err = errors.New("mutual_chap_secret_file needs chap_user and chap_secret_file too: a target proves itself only to whom it authenticates")
	case c.MutualUser != "" && c.MutualSecret == "":
		err = fmt.Errorf("mutual CHAP user %q has no secret: set mutual_chap_secret_file", c.MutualUser)
	case c.MutualSecret != "" && c.MutualSecret == c.Secret:
		err = errors.New("both directions have the same secret, which proves nothing: choose another one for mutual CHAP")
	case short(c.Secret):
		err = fmt.Errorf("the secret of CHAP user %q has less than %d bytes: choose a longer one, here and at the target, or set chap_short_secrets yes", c.User, minSecret)
	case short(c.MutualSecret):
		err = fmt.Errorf("the mutual CHAP secret has less than %d bytes: choose a longer one, here and at the target, or set chap_short_secrets yes", minSecret)
	}
	if err != nil {
		return settingError{err}
	}
	return nil
}

const maxSecretFile = 1024 // bytes

// ReadSecret reads the one line of a secret file. The file must belong to root
// or to us, and nobody else may read or change it.
func ReadSecret(file string) (Secret, error) {
	fail := func(err error) (Secret, error) {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return "", fmt.Errorf("secret file %s: %w", file, err)
	}
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe there must not hang us
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	if !st.Mode().IsRegular() || st.Size() > maxSecretFile {
		return fail(fmt.Errorf("not a regular file of at most %d bytes", maxSecretFile))
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fail(fmt.Errorf("mode %04o lets others at it: chmod 600 %s", st.Mode().Perm(), file))
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && sys.Uid != 0 && int(sys.Uid) != os.Geteuid() {
		return fail(fmt.Errorf("it belongs to user %d: chown it to root, or to who runs mpathd", sys.Uid))
	}
	var buf [maxSecretFile + 1]byte
	defer clear(buf[:])
	n, err := io.ReadFull(f, buf[:])
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return fail(err)
	}
	line := bytes.TrimSuffix(bytes.TrimSuffix(buf[:n], []byte("\n")), []byte("\r"))
	switch {
	case n > maxSecretFile:
		return fail(errors.New("it grows while it is read"))
	case len(line) == 0:
		return fail(errors.New("it is empty"))
	case bytes.ContainsAny(line, "\n\x00"):
		return fail(errors.New("it holds more than one line of text"))
	}
	return Secret(line), nil
}
