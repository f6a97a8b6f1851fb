package initiator

// Offer is what a normal login offers for the moving of data (RFC 7143 13.10 to
// 13.17); the zero value offers the least round trips. It is for targets that
// do one of these badly, and for trials.
type Offer struct {
	InitialR2T      bool // InitialR2T=Yes: no unsolicited Data-Out, whatever the target would like
	NoImmediateData bool // ImmediateData=No: no data in the command's own PDU
	FirstBurst      int  // FirstBurstLength in bytes, 512 to 256 KiB, default 256 KiB
	MaxBurst        int  // MaxBurstLength in bytes, 512 to 1 MiB, default 1 MiB
	MaxData         int  // MaxRecvDataSegmentLength in bytes: what one Data-In may bring, 512 to 256 KiB, default 256 KiB
	MaxR2T          int  // MaxOutstandingR2T, 1 to 8, default 8
}

// complete fills in defaults and forces what was set into its bounds; the
// first burst never exceeds the largest (RFC 7143 13.14).
func (o *Offer) complete() {
	bound := func(v *int, low, high int) {
		if *v <= 0 {
			*v = high
		}
		*v = min(max(*v, low), high)
	}
	bound(&o.MaxBurst, 512, offeredMaxBurst)
	bound(&o.FirstBurst, 512, min(offeredFirstBurst, o.MaxBurst))
	bound(&o.MaxData, 512, offeredMaxData)
	bound(&o.MaxR2T, 1, offeredR2T)
}

// defaults are the parameters in force where the target says nothing (RFC 7143
// clause 13), as far as the offer allows them.
func (o *Offer) defaults() Params {
	return Params{InitialR2T: true, ImmediateData: !o.NoImmediateData, FirstBurst: min(64<<10, o.FirstBurst),
		MaxBurst: min(256<<10, o.MaxBurst), TargetMaxData: 8 << 10, MaxR2T: 1}
}

func yesNo(yes bool) string {
	if yes {
		return "Yes"
	}
	return "No"
}
