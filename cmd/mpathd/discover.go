package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

func sessionTo(u initiator.URL, name string) initiator.Config {
	return initiator.Config{Address: u.Address, TargetName: u.Target, InitiatorName: name, Credentials: u.Credentials,
		ISID: initiator.PathISID(name, u.Target, fmt.Sprint("command ", os.Getpid()))}
}

func discoverCommand() *cobra.Command {
	return &cobra.Command{Use: "discover PORTAL...", Short: "targets, units, sizes and WWIDs behind portals, as PATH-URLs", Args: args(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, portals []string) error {
			name, err := daemon.InitiatorName(logger())
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			for _, p := range portals {
				address, err := initiator.WithPort(p)
				if err != nil {
					return usageError{err}
				}
				ts, err := initiator.Discover(ctx, sessionTo(initiator.URL{Address: address}, name))
				if err != nil {
					return err
				}
				for _, t := range ts {
					for _, at := range t.Portals {
						if err := listUnits(ctx, initiator.URL{Address: at.Address, Target: t.Name}, name); err != nil {
							fmt.Fprintln(os.Stderr, "mpathd:", err)
						}
					}
				}
			}
			return nil
		}}
}

func listUnits(ctx context.Context, u initiator.URL, name string) error {
	s, err := initiator.Open(ctx, sessionTo(u, name))
	if err != nil {
		return err
	}
	defer s.Close(ctx)
	luns, err := initiator.ReportLUNs(ctx, s)
	if err != nil {
		return err
	}
	for _, l := range luns {
		u.LUN, u.HasLUN = scsi.LUNNumber(l), true
		info, err := initiator.Identify(ctx, s, l)
		if err != nil {
			fmt.Printf("%s  # %v\n", u, err)
			continue
		}
		fmt.Printf("%s  # %s %s,%s %s\n", u, size(info.Size()), info.Vendor, info.Product, info.WWID)
	}
	return nil
}

func wwidCommand() *cobra.Command {
	var vpd83, vpd80 string
	var asJSON bool
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
						return err
					}
				}
				if vpd80 != "" {
					b, err := capture(vpd80)
					if err != nil {
						return err
					}
					if serial, err = scsi.ParseVPD80(b); err != nil {
						return err
					}
				}
				wwid, synonyms, _ = scsi.WWID(inq, ds, serial)
			case len(a) == 1:
				u, err := initiator.ParseURL(a[0])
				if err != nil {
					return usageError{err}
				}
				name, err := daemon.InitiatorName(logger())
				if err != nil {
					return err
				}
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				s, err := initiator.Open(ctx, sessionTo(u, name))
				if err != nil {
					return err
				}
				defer s.Close(ctx)
				info, err := initiator.Identify(ctx, s, scsi.LUNFromNumber(u.LUN))
				if err != nil {
					return fmt.Errorf("LUN %d of %s: %w", u.LUN, u.Target, err)
				}
				wwid, synonyms, ds = info.WWID, info.Synonyms, info.Designators
			default:
				return usageError{fmt.Errorf("wwid: name a PATH-URL or --vpd83 FILE")}
			}
			if wwid == "" {
				return fmt.Errorf("wwid: the unit has no usable ID")
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
	return scsi.ParseCapture(b)
}

func targetCommand() *cobra.Command {
	return &cobra.Command{Use: "target [flags]", Short: "a RAM disk behind portals, for trials and drills; never for data", DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, a []string) error {
			if code := target.Main(a, os.Stdout, os.Stderr); code != 0 {
				os.Exit(code)
			}
			return nil
		}}
}
