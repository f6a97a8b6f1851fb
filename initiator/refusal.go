package initiator

import (
	"errors"
	"fmt"
)

// RetryClass says when a failed login is worth trying again.
type RetryClass uint8

const (
	// RetrySoon: it may work at any moment; back off from milliseconds to seconds.
	RetrySoon RetryClass = iota
	// RetrySlowly: it needs a change of configuration, here or at the target,
	// which may come while we run; try every 30 to 60 s.
	RetrySlowly
)

func (r RetryClass) String() string { return [...]string{"soon", "slowly"}[r] }

// Retry is the class of an error of Open or Discover.
func Retry(err error) RetryClass {
	var c interface{ Retry() RetryClass }
	if errors.As(err, &c) {
		return c.Retry()
	}
	return RetrySoon
}

// settingError is a login that our own settings and the target's cannot bring
// about together.
type settingError struct{ error }

func (settingError) Retry() RetryClass { return RetrySlowly }
func (e settingError) Unwrap() error   { return e.error }

func unsettled(format string, a ...any) error { return settingError{fmt.Errorf(format, a...)} }

// LoginError is a login that the target refused, by Status-Class and Status-Detail of
// its Login Response (RFC 7143 11.13.5). Its text says what to do about it, Retry when
// to try again.
type LoginError struct{ Class, Detail uint8 }

// refusals are the statuses of RFC 7143 11.13.5 and what to do about them.
var refusals = map[[2]uint8]struct {
	text  string
	retry RetryClass
}{
	{2, 0x00}: {"the target found an initiator error", RetrySlowly},
	{2, 0x01}: {"authentication failed: check user and secret", RetrySlowly},
	{2, 0x02}: {"this initiator name is not allowed: check the target's ACL", RetrySlowly},
	{2, 0x03}: {"the target name does not exist there: check its spelling, or discover", RetrySlowly},
	{2, 0x04}: {"the target was removed and tells no new address", RetrySlowly},
	{2, 0x05}: {"the target speaks another iSCSI version", RetrySlowly},
	{2, 0x06}: {"too many connections: raise the target's limit of sessions", RetrySoon},
	{2, 0x07}: {"the target misses a parameter", RetrySlowly},
	{2, 0x08}: {"the target cannot take the connection into the session", RetrySlowly},
	{2, 0x09}: {"the target does not do this session type", RetrySlowly},
	{2, 0x0a}: {"the session does not exist: a new one is begun", RetrySoon}, // a login of ours always asks for a new one
	{2, 0x0b}: {"the target found a request invalid during login", RetrySlowly},
	{3, 0x00}: {"the target has an internal error: see its log", RetrySoon},
	{3, 0x01}: {"the service is unavailable: the target may be starting or in maintenance, or (so says LIO) have another name: check its spelling", RetrySoon},
	{3, 0x02}: {"the target is out of resources", RetrySoon},
}

func (e *LoginError) Error() string {
	r, ok := refusals[[2]uint8{e.Class, e.Detail}]
	if !ok {
		switch e.Class {
		case 2:
			r.text = "the target refuses the login for a reason of its own"
		case 3:
			r.text = "the target fails for a reason of its own"
		default:
			r.text = "the target refuses the login with a status that RFC 7143 does not know"
		}
	}
	return fmt.Sprintf("%s (status %02x%02x)", r.text, e.Class, e.Detail)
}

// Retry gives the class of the status. An unknown detail counts as its class
// does in general: 02xx is our error, 03xx the target's.
func (e *LoginError) Retry() RetryClass {
	if r, ok := refusals[[2]uint8{e.Class, e.Detail}]; ok {
		return r.retry
	}
	if e.Class == 2 {
		return RetrySlowly
	}
	return RetrySoon
}
