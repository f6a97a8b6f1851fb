package daemon

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/mpathd/mpathd/initiator"
)

// unit is what was found behind a URL: who it is, or why that cannot be told.
type unit struct {
	lun  [8]byte
	info *initiator.LUInfo
	err  error
}

// look logs in once to learn which units there are behind u and who they are.
func (d *Daemon) look(ctx context.Context, u initiator.URL) ([]unit, error) {
	s, end, err := Inquire(ctx, u, d.sessionConfig(u, "probe "+u.Address))
	if err != nil {
		return nil, err
	}
	defer end()
	luns := [][8]byte{LUN(u)}
	if wholeTarget(u) {
		if luns, err = initiator.ReportLUNs(ctx, s); err != nil {
			return nil, err
		}
	}
	var units []unit
	for _, lun := range luns {
		info, err := initiator.Identify(ctx, s, lun)
		units = append(units, unit{lun, info, err})
	}
	return units, nil
}

// Surveyed is what Survey found.
type Surveyed struct {
	mu    sync.Mutex
	units map[string][]unit // by URL
}

// take returns what was found behind u, once; nil if nothing was.
func (s *Surveyed) take(u initiator.URL) []unit {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	units := s.units[u.String()]
	delete(s.units, u.String())
	return units
}

// surveyTime bounds a Survey: what answers later is asked when it is needed.
const surveyTime = 3 * time.Second

// Survey looks at the units behind o's URLs while another run still serves
// them, so that the one that takes over only has its paths to log in. Each path
// asks its unit again who it is before it serves.
func Survey(ctx context.Context, o Options) *Surveyed {
	d := &Daemon{o: o, log: slog.New(slog.DiscardHandler), names: newNames()}
	ctx, cancel := context.WithTimeout(ctx, surveyTime)
	defer cancel()
	s := &Surveyed{units: map[string][]unit{}}
	urls := slices.Clone(o.Targets)
	for _, text := range o.URLs {
		if u, err := initiator.ParseURL(text); err == nil {
			urls = append(urls, u)
		}
	}
	var wg sync.WaitGroup
	for _, u := range urls {
		wg.Go(func() {
			units, err := d.look(ctx, u)
			if err != nil || slices.ContainsFunc(units, func(n unit) bool { return n.err != nil }) {
				return
			}
			s.mu.Lock()
			s.units[u.String()] = units
			s.mu.Unlock()
		})
	}
	wg.Wait()
	return s
}
