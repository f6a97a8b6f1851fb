package initiator

import (
	"context"
	"fmt"
	"net"
	"time"
)

// Login is a connection that was logged in and that somebody else goes on with:
// the kernel's initiator. The next command has CmdSN, the next PDU received is
// acknowledged with ExpStatSN.
type Login struct {
	Conn              net.Conn // the caller closes it
	Params            Params   // agreed on
	MaxData           int      // what we declared as MaxRecvDataSegmentLength, bytes
	TargetPortalGroup uint16   // TargetPortalGroupTag of the login (RFC 7143 13.9)
	CmdSN, ExpStatSN  uint32
}

// LogIn connects to the portal and logs in as Open does, for a normal session, but
// starts no goroutine on it. Errors as those of Open.
func LogIn(ctx context.Context, c Config) (*Login, error) {
	if c.FailoverTime <= 0 {
		c.FailoverTime = time.Second
	}
	if c.LoginTimeout <= 0 {
		c.LoginTimeout = 5 * time.Second
	}
	if c.Dial == nil {
		c.Dial = defaultDial
	}
	ctx, cancel := context.WithTimeout(ctx, c.LoginTimeout)
	defer cancel()
	conn, lg, err := connectAndLogin(ctx, &c)
	if err != nil {
		return nil, fmt.Errorf("login to %s at %s: %w", c.TargetName, c.Address, err)
	}
	return &Login{Conn: conn, Params: lg.params, MaxData: c.Offer.MaxData, TargetPortalGroup: lg.tpgt, CmdSN: lg.cmdSN, ExpStatSN: lg.expStatSN}, nil
}
