package realtarget

import (
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// tgtd is the target daemon of the Linux SCSI target framework (Debian tgt).
type tgtd struct {
	base
	control int
}

func newTgtd(b base) *tgtd {
	Need(b.t, "tgtd", "tgtadm")
	g := &tgtd{base: b}
	g.ports("127.0.0.1")
	g.control = FreePort(b.t)
	g.preload()
	return g
}

func (g *tgtd) Kind() string    { return "tgtd" }
func (g *tgtd) Version() string { return "tgt " + strings.TrimSpace(command(g.t, "tgtd", "-V")) }
func (g *tgtd) LUN() uint64     { return 1 }
func (g *tgtd) Params() bool    { return true }

func (g *tgtd) adm(args ...string) string {
	g.t.Helper()
	return command(g.t, "tgtadm", append([]string{"-C", fmt.Sprint(g.control), "--lld", "iscsi"}, args...)...)
}

func (g *tgtd) Start() {
	g.t.Helper()
	g.run("tgtd", "-f", "-C", fmt.Sprint(g.control), "--iscsi", "portal="+strings.Join(g.portals, ",portal="))
	for end := time.Now().Add(10 * time.Second); exec.Command("tgtadm", "-C", fmt.Sprint(g.control), "--lld", "iscsi", "--op", "show", "--mode", "sys").Run() != nil; {
		if time.Now().After(end) {
			g.t.Fatal("tgtd does not answer tgtadm")
		}
		time.Sleep(20 * time.Millisecond)
	}
	g.adm("--op", "new", "--mode", "target", "--tid", "1", "-T", g.name)
	g.adm("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", g.image)
	lu := "scsi_id=149455403f160c00,scsi_sn=149455403f160c00,vendor_id=IET,product_id=VIRTUAL-DISK"
	if g.o.Thin {
		lu += ",thin_provisioning=1"
	}
	g.adm("--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "--params", lu)
	for k, v := range g.o.Params {
		if k == "HeaderDigest" || k == "DataDigest" {
			v += ",None"
		}
		g.adm("--op", "update", "--mode", "target", "--tid", "1", "-n", k, "-v", v)
	}
	if g.o.CHAP {
		g.adm("--op", "new", "--mode", "account", "--user", User, "--password", Secret)
		g.adm("--op", "bind", "--mode", "account", "--tid", "1", "--user", User)
	}
	if g.o.Mutual {
		g.adm("--op", "new", "--mode", "account", "--user", MutualUser, "--password", MutualSecret)
		g.adm("--op", "bind", "--mode", "account", "--tid", "1", "--user", MutualUser, "--outgoing")
	}
	g.adm("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
}

func (g *tgtd) Sessions() int {
	return strings.Count(g.adm("--op", "show", "--mode", "conn", "--tid", "1"), "Session:")
}
