package target

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
)

// RunOptions are the flags of `mpathd target`.
type RunOptions struct {
	Size      string   // capacity, as 1G, 512M or bytes; default 1G
	BlockSize int      // logical block, bytes; default 512
	Portals   []string // listening addresses; default 127.0.0.1:3260
	Targets   []string // names; portal i belongs to target i mod n
	// AllTargets puts every target behind every portal.
	AllTargets bool
	Serial     string // serial number, from which the SCSI ID is derived
	// ScsiID selects iSCSI Enterprise Target's identity with this ID of up to
	// 16 characters; "tgt" selects tgtd's numbered default.
	ScsiID string
}

// DefaultTargetName names the target if no --target is given.
const DefaultTargetName = "iqn.2026-01.io.mpathd:ram"

// ParseSize reads a number of bytes with an optional suffix K, M, G or T.
func ParseSize(s string) (uint64, error) {
	digits := strings.TrimRight(strings.TrimSuffix(strings.ToUpper(s), "IB"), "B")
	shift := 0
	if n := len(digits); n > 0 {
		if i := strings.IndexByte("KMGT", digits[n-1]); i >= 0 {
			shift, digits = 10*(i+1), digits[:n-1]
		}
	}
	v, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || v > 1<<63>>shift {
		return 0, fmt.Errorf("size %q: want a number with K, M, G or T, such as 512M", s)
	}
	return v << shift, nil
}

// Start makes the server that the options describe and listens.
func (o RunOptions) Start() (*Server, error) {
	if o.Size == "" {
		o.Size = "1G"
	}
	if o.BlockSize == 0 {
		o.BlockSize = 512
	}
	if len(o.Portals) == 0 {
		o.Portals = []string{"127.0.0.1:3260"}
	}
	if len(o.Targets) == 0 {
		o.Targets = []string{DefaultTargetName}
	}
	if o.Serial == "" {
		o.Serial = "mpathd-ram-0"
	}
	size, err := ParseSize(o.Size)
	if err != nil {
		return nil, err
	}
	if len(o.Serial) > 64 {
		return nil, fmt.Errorf("serial %q: want at most 64 characters", o.Serial)
	}
	id := DefaultIdentity(o.Serial)
	switch {
	case o.ScsiID == "tgt":
		id = TGTIdentity(1, 1)
	case len(o.ScsiID) > 16:
		return nil, fmt.Errorf("SCSI ID %q: want at most 16 characters, or tgt", o.ScsiID)
	case o.ScsiID != "":
		var b [16]byte
		copy(b[:], o.ScsiID)
		id = IETIdentity(b)
	}
	lu, err := NewLU(size, o.BlockSize, id)
	if err != nil {
		return nil, err
	}
	cfg := Config{}
	for _, name := range o.Targets {
		cfg.Targets = append(cfg.Targets, &Target{Name: name, LUs: []*LU{lu}})
	}
	srv, err := New(cfg)
	if err != nil {
		return nil, err
	}
	for i, addr := range o.Portals {
		names := o.Targets
		if !o.AllTargets {
			names = []string{o.Targets[i%len(o.Targets)]}
		}
		if _, err := srv.Listen(addr, names...); err != nil {
			srv.Kill()
			return nil, err
		}
	}
	return srv, nil
}

// Run serves until ctx ends. It prints one line for each portal and target
// once that accepts logins.
func Run(ctx context.Context, o RunOptions, out io.Writer) error {
	srv, err := o.Start()
	if err != nil {
		return err
	}
	defer srv.Kill()
	for _, p := range srv.Portals() {
		for _, name := range p.targets {
			if _, err := fmt.Fprintf(out, "listening iscsi://%s/%s/0\n", p.Addr(), name); err != nil {
				return fmt.Errorf("target: print portal: %w", err)
			}
		}
	}
	<-ctx.Done()
	return nil
}

// list collects a flag given several times or with commas.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }
func (l *list) Set(s string) error {
	for v := range strings.SplitSeq(s, ",") {
		if v = strings.TrimSpace(v); v != "" {
			*l = append(*l, v)
		}
	}
	return nil
}

// Flags are those of `mpathd target`.
func Flags() *flag.FlagSet {
	fs := flag.NewFlagSet("mpathd target", flag.ContinueOnError)
	new(RunOptions).register(fs)
	return fs
}

func (o *RunOptions) register(fs *flag.FlagSet) {
	fs.StringVar(&o.Size, "size", "1G", "capacity of the RAM disk, such as 512M or 1G")
	fs.IntVar(&o.BlockSize, "block-size", 512, "logical block in bytes: 512 to 4096")
	fs.Var((*list)(&o.Portals), "portal", "address to listen on; repeat it or use commas (default 127.0.0.1:3260)")
	fs.Var((*list)(&o.Targets), "target", "target name; with several, portal i belongs to target i mod n (default "+DefaultTargetName+")")
	fs.BoolVar(&o.AllTargets, "all-targets", false, "every target behind every portal")
	fs.StringVar(&o.Serial, "serial", "mpathd-ram-0", "serial number; the SCSI ID is derived from it")
	fs.StringVar(&o.ScsiID, "scsi-id", "", "identify as iSCSI Enterprise Target with this ID, or as tgtd's numbered default with tgt")
}

// Main is `mpathd target`: it parses args, serves until SIGINT or SIGTERM, and
// gives the exit code: 0 ok, 1 failed, 2 usage.
func Main(args []string, stdout, stderr io.Writer) int {
	var o RunOptions
	fs := flag.NewFlagSet("mpathd target", flag.ContinueOnError)
	fs.SetOutput(stderr)
	o.register(fs)
	fs.Usage = func() {
		fmt.Fprintln(stderr, "Usage: mpathd target [flags]\nA RAM disk behind one or more iSCSI portals, for trials and drills; never for data.")
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if _, err := ParseSize(o.Size); err != nil {
		fmt.Fprintln(stderr, "mpathd target: -size:", err)
		return 2
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "mpathd target: unexpected argument %q; see mpathd target --help\n", fs.Arg(0))
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := Run(ctx, o, stdout); err != nil {
		fmt.Fprintln(stderr, "mpathd", err)
		return 1
	}
	return 0
}
