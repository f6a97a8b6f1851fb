// Package prio ranks paths, as the prioritizers of multipath-tools with the
// same names do: the group whose paths have the highest mean serves.
package prio

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// Path is what a prioritizer may look at and ask.
type Path struct {
	Doer          initiator.Doer    // the path's session
	LUN           [8]byte           // raw
	Info          *initiator.LUInfo // as seen through this path; not to be changed
	Name, Address string            // the path's name, host:port of its portal
	Target        string            // target name
}

// Prio is one way to rank. Higher is better, 0 the least; an error leaves the path's
// priority undefined. It may ask the unit, and waits until ctx ends.
type Prio interface {
	Name() string // as in the option prio
	Prio(ctx context.Context, p Path) (int, error)
}

// Access is a Prio that knows the asymmetric access state of a path too (SPC-4 5.15;
// scsi.ActiveOptimized and so on), from one and the same answer.
type Access interface {
	Access(ctx context.Context, p Path) (prio int, state uint8, err error)
}

// Names are those that New knows; sysfs is alua here, netapp is ontap.
var Names = []string{"const", "alua", "sysfs", "weightedpath", "path_latency", "random", "iet", "ontap", "netapp", "datacore", "emc", "rdac", "hds", "hp_sw"}

// New makes a prioritizer from prio and prio_args; an empty name is const. The error
// says which names there are, or what the arguments should be.
func New(name, args string) (Prio, error) {
	switch name {
	case "const", "":
		return constant{}, nil
	case "alua", "sysfs":
		return alua{exclusive: strings.Contains(args, "exclusive_pref_bit")}, nil
	case "weightedpath":
		return newWeighted(args)
	case "path_latency":
		return newLatency(args)
	case "random":
		return random{}, nil
	case "iet":
		ip, ok := strings.CutPrefix(strings.TrimSpace(args), "preferredip=")
		if !ok || net.ParseIP(ip) == nil {
			return nil, fmt.Errorf("prio_args %q: iet wants preferredip=ADDRESS", args)
		}
		return iet{net.ParseIP(ip)}, nil
	case "ontap", "netapp":
		return ontap{}, nil
	case "datacore":
		return newDatacore(args)
	case "emc":
		return emc{}, nil
	case "rdac":
		return rdac{}, nil
	case "hds":
		return hds{}, nil
	case "hp_sw":
		return hpSW{}, nil
	}
	return nil, fmt.Errorf("prio %q: want %s", name, strings.Join(Names, ", "))
}

type constant struct{}

func (constant) Name() string                            { return "const" }
func (constant) Prio(context.Context, Path) (int, error) { return 1, nil }

type random struct{}

func (random) Name() string                            { return "random" }
func (random) Prio(context.Context, Path) (int, error) { return 1 + rand.N(10), nil }

// alua ranks by the asymmetric access state of the path's target port group.
type alua struct {
	exclusive bool // the preferred bit counts for active/optimized too
}

func (alua) Name() string { return "alua" }

func (a alua) Prio(ctx context.Context, p Path) (int, error) {
	n, _, err := a.Access(ctx, p)
	return n, err
}

var errNoGroup = errors.New("the unit names no target port group on page 83: is this an ALUA array?")

func (a alua) Access(ctx context.Context, p Path) (int, uint8, error) {
	_, id, ok := scsi.TargetPort(p.Info.Designators)
	if !ok {
		return 0, 0, errNoGroup
	}
	groups, err := initiator.TargetPortGroups(ctx, p.Doer, p.LUN)
	if err != nil {
		return 0, 0, err
	}
	for _, g := range groups {
		if g.ID != id {
			continue
		}
		n := 0
		switch g.State {
		case scsi.ActiveOptimized:
			n = 50
		case scsi.ActiveNonOptimized:
			n = 10
		case scsi.LBADependent:
			n = 5
		case scsi.Standby:
			n = 1
		}
		if g.Preferred && (g.State != scsi.ActiveOptimized || a.exclusive) {
			n += 80
		}
		return n, g.State, nil
	}
	return 0, 0, fmt.Errorf("target port group %d is not among the %d that the unit reports", id, len(groups))
}

// weighted gives the priority of the first expression that matches.
type weighted struct {
	by    string
	rules []rule
}

type rule struct {
	re   *regexp.Regexp
	prio int
}

func newWeighted(args string) (Prio, error) {
	f := strings.Fields(args)
	if len(f) < 3 || len(f)%2 == 0 {
		return nil, fmt.Errorf("prio_args %q: weightedpath wants devname, serial or wwn, then pairs of expression and priority", args)
	}
	w := weighted{by: f[0]}
	switch w.by {
	case "devname", "serial", "wwn":
	case "hbtl":
		return nil, fmt.Errorf("prio_args %q: these paths have no host:bus:target:lun address; devname matches the path's name (address:port/lun), wwn the target's", args)
	default:
		return nil, fmt.Errorf("prio_args %q: weightedpath matches devname, serial or wwn, not %q", args, w.by)
	}
	for i := 1; i < len(f); i += 2 {
		re, err := regexp.CompilePOSIX(f[i])
		if err != nil {
			return nil, fmt.Errorf("prio_args: %w", err)
		}
		n, err := strconv.Atoi(f[i+1])
		if err != nil || n < 0 {
			return nil, fmt.Errorf("prio_args: priority %q is no number", f[i+1])
		}
		w.rules = append(w.rules, rule{re, n})
	}
	return w, nil
}

func (weighted) Name() string { return "weightedpath" }

func (w weighted) Prio(_ context.Context, p Path) (int, error) {
	s := p.Name
	switch w.by {
	case "serial":
		s = p.Info.Serial
	case "wwn":
		s = p.Address + ":" + p.Target
	}
	for _, r := range w.rules {
		if r.re.MatchString(s) {
			return r.prio, nil
		}
	}
	return 0, nil
}

// latency ranks by the logarithm of the time that a read takes, so that paths
// of one kind fall into one group.
type latency struct {
	reads int
	base  float64
}

const longest = 100e6 // us; a read of that long has priority 0

func newLatency(args string) (Prio, error) {
	l := latency{100, 2}
	for _, f := range strings.Fields(args) {
		k, v, _ := strings.Cut(f, "=")
		x, err := strconv.ParseFloat(v, 64)
		switch {
		case k == "io_num" && err == nil && x >= 20 && x <= 200:
			l.reads = int(x)
		case k == "base_num" && err == nil && x >= 1.1 && x <= 10:
			l.base = x
		default:
			return nil, fmt.Errorf("prio_args: %q: path_latency wants io_num=20..200 and base_num=1.1..10", f)
		}
	}
	return l, nil
}

func (latency) Name() string { return "path_latency" }

func (l latency) Prio(ctx context.Context, p Path) (int, error) {
	if p.Info.BlockSize <= 0 {
		return 0, errors.New("the unit does not tell its block size through this path")
	}
	sum := 0.0
	for range l.reads {
		began := time.Now()
		if err := initiator.ReadBlocks(ctx, p.Doer, p.LUN, 0, max(1, 4096/p.Info.BlockSize), p.Info.BlockSize, p.Info.Use16); err != nil {
			return 0, err
		}
		sum += l.log(float64(time.Since(began).Microseconds()))
	}
	return int(l.log(longest) - sum/float64(l.reads)), nil
}

func (l latency) log(us float64) float64 {
	return math.Log(min(max(us, 1), longest)) / math.Log(l.base)
}

// iet prefers one portal address, exactly.
type iet struct{ ip net.IP }

func (iet) Name() string { return "iet" }

func (i iet) Prio(_ context.Context, p Path) (int, error) {
	host, _, err := net.SplitHostPort(p.Address)
	if err == nil && net.ParseIP(host).Equal(i.ip) {
		return 20, nil
	}
	return 10, nil
}

// ontap tells Fibre Channel from iSCSI: every path here is software iSCSI.
type ontap struct{}

func (ontap) Name() string                            { return "ontap" }
func (ontap) Prio(context.Context, Path) (int, error) { return 2, nil }

// datacore prefers the server that names itself in its INQUIRY data.
type datacore struct{ server string }

func newDatacore(args string) (Prio, error) {
	for _, f := range strings.Fields(args) {
		if s, ok := strings.CutPrefix(f, "preferredsds="); ok && s != "" {
			return datacore{s}, nil
		}
	}
	return nil, fmt.Errorf("prio_args %q: datacore wants preferredsds=SERVER", args)
}

func (datacore) Name() string { return "datacore" }

func (d datacore) Prio(ctx context.Context, p Path) (int, error) {
	b, err := initiator.InquiryData(ctx, p.Doer, p.LUN)
	if err != nil {
		return 0, err
	}
	if len(b) > 36 && strings.Contains(string(b[36:]), d.server) {
		return 1, nil
	}
	return 0, nil
}
