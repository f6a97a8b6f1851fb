package pdu

import (
	"bytes"
	"errors"
	"fmt"
)

// Key is one key=value pair of login or text data (RFC 7143 6.1).
type Key struct{ Name, Value string }

// Limits on received text, which a hostile peer cannot exceed.
const (
	MaxTextLen  = 64 << 10 // bytes of one joined negotiation
	maxKeys     = 4096
	maxKeyName  = 63
	maxKeyValue = 8192
)

// protocolLevel is the one key that does not begin with a capital (RFC 7143 6.1, 13.24).
const protocolLevel = "iSCSIProtocolLevel"

var errText = errors.New("malformed text")

// AppendKey appends name=value and the terminating NUL to b.
func AppendKey(b []byte, name, value string) []byte {
	b = append(b, name...)
	b = append(b, '=')
	b = append(b, value...)
	return append(b, 0)
}

// ParseKeys splits the joined text of a negotiation into its pairs, in order.
// Duplicate names are kept. NULs that follow a pair are padding; text of
// nothing else is an error.
func ParseKeys(data []byte) ([]Key, error) { return ParseList(data, MaxTextLen, maxKeys) }

// ParseList is ParseKeys with limits of the caller's: SendTargets may bring far
// more than a negotiation does.
func ParseList(data []byte, maxLen, maxKeys int) ([]Key, error) {
	var keys []Key
	if len(data) > maxLen {
		return nil, fmt.Errorf("%w: %d bytes", errText, len(data))
	}
	for len(data) > 0 {
		end := bytes.IndexByte(data, 0)
		if end < 0 {
			return nil, fmt.Errorf("%w: not terminated by NUL", errText)
		}
		item := data[:end]
		data = data[end+1:]
		if len(item) == 0 {
			if len(keys) == 0 {
				return nil, fmt.Errorf("%w: begins with NUL", errText)
			}
			continue
		}
		eq := bytes.IndexByte(item, '=')
		if eq <= 0 || eq > maxKeyName {
			return nil, fmt.Errorf("%w: no key name", errText)
		}
		if (item[0] < 'A' || item[0] > 'Z') && string(item[:eq]) != protocolLevel {
			return nil, fmt.Errorf("%w: key name begins with byte %#02x", errText, item[0])
		}
		for _, c := range item[:eq] {
			if !keyChar(c) {
				return nil, fmt.Errorf("%w: key name has byte %#02x", errText, c)
			}
		}
		if len(item)-eq-1 > maxKeyValue || len(keys) == maxKeys {
			return nil, fmt.Errorf("%w: too long", errText)
		}
		keys = append(keys, Key{string(item[:eq]), string(item[eq+1:])})
	}
	return keys, nil
}

func keyChar(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	}
	return bytes.IndexByte([]byte(".-+@_#"), c) >= 0
}
