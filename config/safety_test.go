package config

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What protects writes can be said wherever a policy can, and the usual one wins.
func TestWriteSafetyWordsFollowThePrecedenceOfAllOthers(t *testing.T) {
	c := Parse("f", `defaults {
	ghost_protection strict
	shadow_limit 16
	fence_wait 5s
}
devices {
	device {
		vendor "IET"
		product ".*"
		quarantine 1m
		ghost_protection off
		fence_command "from devices"
	}
}
overrides {
	replicated yes
	ghost_protection hold
}
multipaths {
	multipath {
		wwid x
		ghost_protection shadow
		shadow_limit 8
		fence_command "stonith --off $MPATHD_PORTAL"
	}
}
`)
	require.Empty(t, errorsOf(c))
	s := c.For(LU{WWID: "x", Vendor: "IET", Product: "VIRTUAL-DISK"})
	require.Equal(t, "shadow", s.Protection)
	require.EqualValues(t, 8<<20, s.ShadowLimit)
	require.Equal(t, 5*time.Second, s.FenceWait)
	require.Equal(t, time.Minute, s.Quarantine)
	require.Equal(t, "stonith --off $MPATHD_PORTAL", s.FenceCommand)
	require.True(t, s.Replicated)
	s = c.For(LU{WWID: "y", Vendor: "IET", Product: "VIRTUAL-DISK"})
	require.Equal(t, "hold", s.Protection)
	require.Equal(t, "from devices", s.FenceCommand)
	s = c.For(LU{WWID: "z", Vendor: "LIO", Product: "x"})
	require.Equal(t, "hold", s.Protection)
	require.Empty(t, s.FenceCommand)
	require.Zero(t, s.Quarantine)
	e := c.Effective()
	require.Equal(t, "strict", e["ghost_protection"])
	require.Equal(t, "16", e["shadow_limit"])
	require.Equal(t, "5s", e["fence_wait"])
	require.Equal(t, "no", e["replicated"])
}

func TestUnsaidFailbackIsLeftToTheNumberOfServers(t *testing.T) {
	require.Empty(t, Parse("f", "").For(LU{}).Failback)
	require.Equal(t, "immediate", Parse("f", "defaults {\n failback 0\n}\n").For(LU{}).Failback)
}
