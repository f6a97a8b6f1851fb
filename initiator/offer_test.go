package initiator_test

import (
	"context"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

// What Config.Offer says goes out, and is what answers are held against.
func TestLoginOffersWhatTheConfigSays(t *testing.T) {
	for _, c := range []struct {
		name    string
		offer   initiator.Offer
		answers []string
		want    initiator.Params
		wrong   string
	}{
		{"default", initiator.Offer{}, []string{"InitialR2T", "No", "ImmediateData", "Yes", "FirstBurstLength", "262144", "MaxBurstLength", "1048576", "MaxOutstandingR2T", "8"},
			initiator.Params{ImmediateData: true, FirstBurst: 256 << 10, MaxBurst: 1 << 20, MaxR2T: 8}, ""},
		{"least", initiator.Offer{InitialR2T: true, NoImmediateData: true, FirstBurst: 512, MaxBurst: 1024, MaxData: 512, MaxR2T: 1},
			[]string{"InitialR2T", "Yes", "ImmediateData", "No", "FirstBurstLength", "512", "MaxBurstLength", "1024", "MaxOutstandingR2T", "1"},
			initiator.Params{InitialR2T: true, FirstBurst: 512, MaxBurst: 1024, MaxR2T: 1}, ""},
		{"the target says nothing", initiator.Offer{NoImmediateData: true, FirstBurst: 4096, MaxBurst: 8192}, []string{"TargetAlias", "x"},
			initiator.Params{InitialR2T: true, FirstBurst: 4096, MaxBurst: 8192, MaxR2T: 1}, ""},
		{"a first burst above the largest", initiator.Offer{FirstBurst: 65536, MaxBurst: 8192}, []string{"FirstBurstLength", "8192", "MaxBurstLength", "8192"},
			initiator.Params{InitialR2T: true, ImmediateData: true, FirstBurst: 8192, MaxBurst: 8192, MaxR2T: 1}, ""},
		{"unsolicited data against the offer", initiator.Offer{InitialR2T: true}, []string{"InitialR2T", "No"}, initiator.Params{}, "InitialR2T=No, Yes was offered"},
		{"immediate data against the offer", initiator.Offer{NoImmediateData: true}, []string{"ImmediateData", "Yes"}, initiator.Params{}, "ImmediateData=Yes, No was offered"},
		{"a larger burst than offered", initiator.Offer{MaxBurst: 8192}, []string{"MaxBurstLength", "65536"}, initiator.Params{}, `MaxBurstLength="65536", 512 to 8192 was possible`},
	} {
		t.Run(c.name, func(t *testing.T) {
			offered := make(chan []pdu.Key, 1)
			config := scripted(t, func(_ int, r *raw) {
				r.login(append([]string{"MaxRecvDataSegmentLength", "8192"}, c.answers...)...)
				offered <- r.offered
				r.drain()
			})
			config.Offer = c.offer
			s, err := initiator.Open(context.Background(), config)
			keys := map[string]string{}
			for _, k := range <-offered {
				keys[k.Name] = k.Value
			}
			if c.wrong != "" {
				require.ErrorContains(t, err, c.wrong)
				return
			}
			require.NoError(t, err)
			t.Cleanup(func() { s.Abort(io.EOF); <-s.Done() })
			c.want.TargetMaxData = 8192
			require.Equal(t, c.want, s.Negotiated())
			switch c.name {
			case "default":
				require.Equal(t, []string{"No", "Yes", "262144", "1048576", "262144", "8"}, values(keys))
			case "least":
				require.Equal(t, []string{"Yes", "No", "512", "1024", "512", "1"}, values(keys))
			case "a first burst above the largest":
				require.Equal(t, []string{"No", "Yes", "8192", "8192", "262144", "8"}, values(keys))
			}
		})
	}
}

func values(keys map[string]string) (out []string) {
	for _, k := range []string{"InitialR2T", "ImmediateData", "FirstBurstLength", "MaxBurstLength", "MaxRecvDataSegmentLength", "MaxOutstandingR2T"} {
		out = append(out, keys[k])
	}
	return out
}
