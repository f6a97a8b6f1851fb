package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/mpathd/mpathd/paths"
)

const (
	fenceOutput = 4 << 10 // bytes of a fence command's output that are logged
	fenceKill   = time.Second
)

// FenceCommand makes a fence of a shell command (paths.Config.FenceCommand). It
// gets MPATHD_MAP, MPATHD_WWID, MPATHD_PATH, MPATHD_TARGET and MPATHD_PORTAL;
// exit status 0 means that the path's server can write no more. What it prints
// goes to the log; one that hangs is killed with all its children.
func FenceCommand(log *slog.Logger, command string) func(context.Context, paths.FenceRequest) error {
	return func(ctx context.Context, r paths.FenceRequest) error {
		c := exec.CommandContext(ctx, "/bin/sh", "-c", command)
		c.Env = append(os.Environ(), "MPATHD_MAP="+r.Map, "MPATHD_WWID="+r.WWID, "MPATHD_PATH="+r.Path, "MPATHD_TARGET="+r.Target, "MPATHD_PORTAL="+r.Portal)
		c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
		c.WaitDelay = fenceKill
		out := &limited{}
		c.Stdout, c.Stderr = out, out
		began := time.Now()
		log.Info("fence command started", "map", r.Map, "path", r.Path)
		err := c.Run()
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = fmt.Errorf("killed: it hung for %v", time.Since(began).Round(time.Millisecond))
		}
		for line := range strings.Lines(out.b.String()) {
			log.Info("fence command says", "map", r.Map, "path", r.Path, "text", strings.TrimRight(line, "\n"))
		}
		if errors.Is(err, exec.ErrWaitDelay) { // it succeeded; a child of it holds its output open
			err = nil
		}
		return err
	}
}

// limited keeps the first fenceOutput bytes.
type limited struct{ b bytes.Buffer }

func (l *limited) Write(b []byte) (int, error) {
	l.b.Write(b[:min(len(b), fenceOutput-l.b.Len())])
	return len(b), nil
}
