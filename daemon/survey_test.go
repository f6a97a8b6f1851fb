package daemon

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
)

func TestASurveySparesTheNextRunItsQuestions(t *testing.T) {
	_, portals := disk(t, "survey", 2)
	o := Options{InitiatorName: "iqn.2026-01.test:host"}
	for _, p := range portals {
		u, err := initiator.ParseURL(p.URL(0))
		require.NoError(t, err)
		o.Targets = append(o.Targets, u)
	}
	silent, err := initiator.ParseURL("iscsi://" + unusedAddress(t) + "/iqn.t:none/0")
	require.NoError(t, err)
	o.Targets = append(o.Targets, silent)
	began := time.Now()
	s := Survey(context.Background(), o)
	require.Less(t, time.Since(began), surveyTime+time.Second)
	for _, u := range o.Targets[:2] {
		units := s.take(u)
		require.Len(t, units, 1)
		require.NotEmpty(t, units[0].info.WWID)
		require.Nil(t, s.take(u), "what was found is old by the second time")
	}
	require.Nil(t, s.take(silent))
	require.Nil(t, (*Surveyed)(nil).take(silent))
}
