package daemon

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

const (
	openISCSIName = "/etc/iscsi/initiatorname.iscsi"
	ownName       = "/var/lib/mpathd/initiatorname"
)

// InitiatorName is open-iscsi's name for this host, else one that was
// generated once and kept: targets and session reinstatement depend on it
// staying the same.
func InitiatorName(log *slog.Logger) (string, error) {
	for _, f := range []string{openISCSIName, ownName} {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(strings.TrimSpace(line), "InitiatorName="); ok && v != "" {
				return strings.TrimSpace(v), nil
			}
		}
	}
	var b [6]byte
	rand.Read(b[:])
	name := "iqn.2026-11.org.mpathd:" + hex.EncodeToString(b[:])
	err := os.MkdirAll(filepath.Dir(ownName), 0o755)
	if err == nil {
		err = os.WriteFile(ownName, []byte("InitiatorName="+name+"\n"), 0o644)
	}
	if err != nil {
		log.Warn("the generated initiator name could not be kept and changes at the next start; give one with --initiator", "name", name, "cause", fmt.Sprint(err))
	}
	return name, nil
}

// reservationKey is a path's key for persistent reservations: the same in each
// run, so that a key that a crash left is known. "mp", three bytes of the
// initiator's name, three of the path's.
func reservationKey(initiator, path string) uint64 {
	host, own := sha256.Sum256([]byte(initiator)), sha256.Sum256([]byte(path))
	return binary.BigEndian.Uint64([]byte{'m', 'p', host[0], host[1], host[2], own[0], own[1], own[2]})
}
