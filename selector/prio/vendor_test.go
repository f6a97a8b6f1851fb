package prio

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/internal/target"
)

// answering is a path whose unit answers one command of those that asked
// describes as given.
func answering(t *testing.T, asked func(*target.Cmd) bool, act target.Action) Path {
	return session(t, nil, func(c *target.Cmd) target.Action {
		if asked(c) {
			return act
		}
		return target.Action{}
	})
}

func vpd(code byte) func(*target.Cmd) bool {
	return func(c *target.Cmd) bool { return c.Op() == 0x12 && c.CDB[1]&1 == 1 && c.CDB[2] == code }
}

func TestEMC(t *testing.T) {
	page := func(change func(b []byte)) []byte {
		b := make([]byte, 128)
		b[1], b[3], b[4], b[5], b[8], b[27], b[28], b[30] = 0xc0, 124, 2, 1, 1, 3, 4, 4
		change(b)
		return b
	}
	for _, x := range []struct {
		change func(b []byte)
		prio   int
	}{
		{func(b []byte) {}, 4},                    // owner, and by configuration too
		{func(b []byte) { b[8] = 0 }, 2},          // owner only
		{func(b []byte) { b[4] = 1 }, 3},          // trespassed away
		{func(b []byte) { b[4], b[8] = 1, 0 }, 1}, // the other processor
	} {
		want(t, x.prio, "emc", "", answering(t, vpd(0xc0), target.Action{Data: page(x.change)}))
	}
	_, err := ask(t, "emc", "", answering(t, vpd(0xc0), target.Action{Data: page(func(b []byte) { b[48] = 1 })}))
	require.ErrorContains(t, err, "under way")
	_, err = ask(t, "emc", "", answering(t, vpd(0xc0), target.Action{Data: page(func(b []byte) { b[30] = 0 })}))
	require.ErrorContains(t, err, "arraycommpath")
	_, err = ask(t, "emc", "", session(t, nil, nil))
	require.Error(t, err, "no such page")
}

func TestRDAC(t *testing.T) {
	for _, x := range []struct {
		flags, path byte
		prio        int
	}{{0x01, 1, 6}, {0x01, 2, 3}, {0, 1, 4}, {0, 2, 1}, {0x20, 1, 12}, {0, 0, 0}} {
		b := make([]byte, 48)
		b[1], b[3], b[8], b[9] = 0xc9, 44, x.flags, x.path
		want(t, x.prio, "rdac", "", answering(t, vpd(0xc9), target.Action{Data: b}))
	}
	_, err := ask(t, "rdac", "", session(t, nil, nil))
	require.Error(t, err, "no such page")
}

func TestHDS(t *testing.T) {
	inquiry := func(c *target.Cmd) bool { return c.Op() == 0x12 && c.CDB[1]&1 == 0 }
	for what, prio := range map[string]int{"00C6 0A": 1, "00C6 1A": 0, "00C7 1B": 1, "00CF 0A": 0} {
		b := make([]byte, 96)
		b[4] = 91
		copy(b[44:], what)
		want(t, prio, "hds", "", answering(t, inquiry, target.Action{Data: b}))
	}
	for _, b := range [][]byte{make([]byte, 96), make([]byte, 40)} {
		_, err := ask(t, "hds", "", answering(t, inquiry, target.Action{Data: b}))
		require.ErrorContains(t, err, "is this a Hitachi")
	}
}

func TestHPSW(t *testing.T) {
	ready := func(c *target.Cmd) bool { return c.Op() == 0x00 }
	sense := func(key, asc, ascq byte) target.Action {
		return target.Action{Status: 2, Sense: target.Sense{Key: key, ASC: asc, ASCQ: ascq}}
	}
	want(t, 4, "hp_sw", "", session(t, nil, nil))
	want(t, 2, "hp_sw", "", answering(t, ready, sense(2, 4, 2)))
	_, err := ask(t, "hp_sw", "", answering(t, ready, sense(2, 4, 3)))
	require.Error(t, err)
}

func TestEveryNameIsAPrioritizer(t *testing.T) {
	args := map[string]string{"weightedpath": "devname . 1", "iet": "preferredip=10.0.0.1", "datacore": "preferredsds=A"}
	for _, name := range Names {
		_, err := New(name, args[name])
		require.NoError(t, err, name)
	}
	_, err := New("ana", "")
	require.ErrorContains(t, err, fmt.Sprint("want ", Names[0]))
}
