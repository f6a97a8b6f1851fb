package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/mpathd/mpathd/compat"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

// sessionTo is a session of this command alone: its ISID is that of no path of
// a daemon, and of no other portal.
func sessionTo(u initiator.URL, name string) initiator.Config {
	return initiator.Config{Address: u.Address, TargetName: u.TargetName(), InitiatorName: name, Credentials: u.Credentials, Lenient: true,
		ISID: initiator.PathISID(name, u.Target, fmt.Sprint("command ", os.Getpid(), u.Address))}
}

func discoverCommand() *cobra.Command {
	var chap chapFlags
	var asJSON bool
	c := &cobra.Command{Use: "discover PORTAL...", Short: "targets, units, sizes and WWIDs behind portals, as PATH-URLs", Args: args(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, portals []string) error {
			var from []initiator.URL
			own, err := withCredentials(chap.Section, initiator.Credentials{})
			if err != nil {
				return err
			}
			for _, p := range portals {
				address, err := initiator.WithPort(p)
				if err != nil {
					return usageError{err}
				}
				from = append(from, initiator.URL{Address: address, Credentials: own})
			}
			name, err := daemon.InitiatorName(logger())
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			urls, failed := askPortals(ctx, from, name)
			if !asJSON {
				return errors.Join(failed, listAll(ctx, urls, name, func(u unit) { fmt.Println(u) }))
			}
			all := []unit{}
			failed = errors.Join(failed, listAll(ctx, urls, name, func(u unit) { all = append(all, u) }))
			return errors.Join(failed, printJSON(map[string]any{"version": 1, "units": all}))
		}}
	chap.register(c.Flags())
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// unit is what discover tells of a logical unit through one portal.
type unit struct {
	URL     string `json:"url"`
	Size    int64  `json:"size"` // bytes
	Vendor  string `json:"vendor"`
	Product string `json:"product"`
	WWID    string `json:"wwid"`
	Error   string `json:"error,omitempty"` // why the rest is empty
}

func (u unit) String() string {
	if u.Error != "" {
		return u.URL + "  # " + u.Error
	}
	return fmt.Sprintf("%s  # %s %s,%s %s", u.URL, compat.Size(u.Size), u.Vendor, u.Product, u.WWID)
}

// askPortals asks each portal for its targets. The error tells of those that
// did not answer; what the others named is listed all the same.
func askPortals(ctx context.Context, from []initiator.URL, name string) (urls []initiator.URL, failed error) {
	for _, p := range from {
		found, err := initiator.Discover(ctx, sessionTo(p, name))
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		for _, why := range found.Skipped {
			fmt.Fprintln(os.Stderr, "mpathd: left out:", why)
		}
		for _, t := range found.Targets {
			for _, at := range t.Portals {
				u := initiator.TargetURL(at, t.Name)
				u.Credentials = p.Credentials
				if !slices.ContainsFunc(urls, func(have initiator.URL) bool { return have.String() == u.String() }) {
					urls = append(urls, u)
				}
			}
		}
	}
	return urls, failed
}

const discoverAtOnce = 8 // logins

// listAll tells the units behind urls in their order, looking at several at
// once, so that portals that do not answer take no turn of those that do. It
// fails if there is none: portals that others name may well be out of reach.
func listAll(ctx context.Context, urls []initiator.URL, name string, tell func(unit)) error {
	units, errs := make([][]unit, len(urls)), make([]error, len(urls))
	ready := make([]chan struct{}, len(urls))
	turn := make(chan struct{}, discoverAtOnce)
	for i, u := range urls {
		ready[i] = make(chan struct{})
		go func() {
			turn <- struct{}{}
			units[i], errs[i] = listUnits(ctx, u, name)
			<-turn
			close(ready[i])
		}()
	}
	found := false
	for i := range urls {
		<-ready[i]
		for _, u := range units[i] {
			tell(u)
			found = true
		}
		if errs[i] != nil {
			complain(errs[i])
		}
	}
	if !found && len(urls) > 0 {
		return errors.New("discover: no logical unit could be reached")
	}
	return nil
}

// listUnits lists the units of a target.
func listUnits(ctx context.Context, u initiator.URL, name string) (out []unit, err error) {
	s, err := initiator.Open(ctx, sessionTo(u, name))
	if err != nil {
		return nil, err
	}
	defer s.Close(ctx)
	luns, err := initiator.ReportLUNs(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", u, err)
	}
	for _, l := range luns {
		u.LUN, u.HasLUN = l, true
		info, err := initiator.Identify(ctx, s, l)
		if err != nil {
			out = append(out, unit{URL: u.String(), Error: err.Error()})
			continue
		}
		out = append(out, unit{URL: u.String(), Size: info.Size(), Vendor: info.Vendor, Product: info.Product, WWID: info.WWID})
	}
	return out, nil
}

func wwidCommand() *cobra.Command {
	var vpd83, vpd80 string
	var asJSON bool
	var chap chapFlags
	c := &cobra.Command{Use: "wwid PATH-URL | --vpd83 FILE [--vpd80 FILE]", Short: "the SCSI ID as scsi_id prints it", Args: args(cobra.MaximumNArgs(1)),
		RunE: func(_ *cobra.Command, a []string) error {
			var ds []scsi.Designator
			var inq scsi.InquiryData
			var wwid, serial string
			var synonyms []string
			switch {
			case vpd83 != "" || vpd80 != "":
				if vpd83 != "" {
					b, err := capture(vpd83)
					if err != nil {
						return err
					}
					if ds, err = scsi.ParseVPD83(b); err != nil {
						return fmt.Errorf("wwid: page 83 of %s: %w", vpd83, err)
					}
				}
				if vpd80 != "" {
					b, err := capture(vpd80)
					if err != nil {
						return err
					}
					if serial, err = scsi.ParseVPD80(b); err != nil {
						return fmt.Errorf("wwid: page 80 of %s: %w", vpd80, err)
					}
				}
				wwid, synonyms, _ = scsi.WWID(inq, ds, serial)
			case len(a) == 1:
				urls, err := chap.parseURLs(a)
				if err != nil {
					return err
				}
				u := urls[0]
				name, err := daemon.InitiatorName(logger())
				if err != nil {
					return err
				}
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				s, end, err := daemon.Inquire(ctx, u, sessionTo(u, name))
				if err != nil {
					return err
				}
				defer end()
				info, err := initiator.Identify(ctx, s, daemon.LUN(u))
				if err != nil {
					return fmt.Errorf("%s: %w", daemon.UnitName(u), err)
				}
				wwid, synonyms, ds = info.WWID, info.Synonyms, info.Designators
			default:
				return usageError{fmt.Errorf("wwid: name a PATH-URL or --vpd83 FILE")}
			}
			if wwid == "" {
				return fmt.Errorf("wwid: the unit has no usable ID: set one, or a serial number, at the target")
			}
			if !asJSON {
				fmt.Println(wwid)
				return nil
			}
			texts := []scsi.DesignatorText{}
			for _, d := range ds {
				texts = append(texts, scsi.Describe(d))
			}
			if synonyms == nil {
				synonyms = []string{}
			}
			return printJSON(map[string]any{"wwid": wwid, "synonyms": synonyms, "designators": texts})
		}}
	chap.register(c.Flags())
	c.Flags().StringVar(&vpd83, "vpd83", "", "captured page 0x83, hex or binary, - is stdin")
	c.Flags().StringVar(&vpd80, "vpd80", "", "captured page 0x80")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// capture reads a captured page; nothing near 64 KiB is one.
func capture(file string) ([]byte, error) {
	f := os.Stdin
	if file != "-" {
		var err error
		if f, err = os.Open(file); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return nil, err
	}
	page, err := scsi.ParseCapture(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return page, nil
}

func targetCommand() *cobra.Command {
	c := &cobra.Command{Use: "target [flags]", Short: "a RAM disk behind portals, for trials and drills; never for data", DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, a []string) error {
			if code := target.Main(a, os.Stdout, os.Stderr); code != 0 {
				os.Exit(code)
			}
			return nil
		}}
	c.Flags().AddGoFlagSet(target.Flags()) // for the manual and the shells
	return c
}
