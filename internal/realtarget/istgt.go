package realtarget

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// istgt is the target daemon of FreeBSD's ports (Debian istgt).
type istgt struct {
	base
	config  string
	control int
}

func newIstgt(b base) *istgt {
	Need(b.t, "istgt", "istgtcontrol")
	g := &istgt{base: b}
	g.ports("127.0.0.1")
	g.control = FreePort(b.t)
	g.preload()
	g.configure()
	return g
}

func (g *istgt) Kind() string { return "istgt" }
func (g *istgt) LUN() uint64  { return 0 }
func (g *istgt) Params() bool { return true }

func (g *istgt) Version() string {
	out, _ := exec.Command("istgt", "-V").CombinedOutput() // exits with 1 after a proper answer
	f := strings.Fields(string(out))
	if len(f) < 3 {
		return "istgt"
	}
	return fmt.Sprintf("istgt %s (%s)", f[2], f[len(f)-1])
}

func (g *istgt) configure() {
	dir := g.t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			g.t.Fatal(err)
		}
		return path
	}
	mutual := ""
	if g.o.Mutual {
		mutual = fmt.Sprintf(" %q %q", MutualUser, MutualSecret)
	}
	auth := write("auth.conf", fmt.Sprintf("[AuthGroup1]\n  Auth %q %q%s\n[AuthGroup2]\n  Auth \"control\" \"control-secret\" \"controlled\" \"controlled-secret\"\n", User, Secret, mutual))
	method := "None"
	switch {
	case g.o.Mutual:
		method = "CHAP Mutual"
	case g.o.CHAP:
		method = "CHAP"
	}
	keys := map[string]string{"MaxOutstandingR2T": "16", "DefaultTime2Wait": "2", "DefaultTime2Retain": "60", "FirstBurstLength": "262144", "MaxBurstLength": "1048576",
		"MaxRecvDataSegmentLength": "262144", "InitialR2T": "Yes", "ImmediateData": "Yes", "DataPDUInOrder": "Yes", "DataSequenceInOrder": "Yes", "ErrorRecoveryLevel": "0"}
	digest := ""
	for k, v := range g.o.Params {
		if d, ok := strings.CutSuffix(k, "Digest"); ok {
			if v == "CRC32C" {
				digest += " " + d
			}
			continue
		}
		keys[k] = v
	}
	if digest == "" {
		digest = " Auto"
	}
	var c strings.Builder
	fmt.Fprintf(&c, "[Global]\n  NodeBase \"iqn.2009-01.nl.pref\"\n  PidFile %s/pid\n  AuthFile %s\n  MediaDirectory %s\n  LogFacility \"local7\"\n  Timeout %d\n  NopInInterval 20\n  DiscoveryAuthMethod Auto\n  MaxSessions 16\n  MaxConnections 4\n  MaxR2T 32\n", dir, auth, dir, g.o.Timeout)
	for k, v := range keys {
		fmt.Fprintf(&c, "  %s %s\n", k, v)
	}
	fmt.Fprintf(&c, "[UnitControl]\n  AuthMethod CHAP Mutual\n  AuthGroup AuthGroup2\n  Portal UC1 127.0.0.1:%d\n  Netmask 127.0.0.1\n[PortalGroup1]\n", g.control)
	for i, p := range g.portals {
		fmt.Fprintf(&c, "  Portal DA%d %s\n", i+1, p)
	}
	fmt.Fprintf(&c, "[InitiatorGroup1]\n  InitiatorName \"ALL\"\n  Netmask 127.0.0.0/8\n[LogicalUnit1]\n  TargetName %q\n  Mapping PortalGroup1 InitiatorGroup1\n  AuthMethod %s\n  AuthGroup AuthGroup1\n  UseDigest%s\n  UnitType Disk\n  UnitInquiry \"FreeBSD\" \"iSCSI Disk\" \"0123\" \"10000001\"\n  LUN0 Storage %s %dMB\n",
		g.name, method, digest, g.image, g.o.Size>>20)
	write("control.conf", fmt.Sprintf("[Global]\n  Timeout 10\n  AuthMethod CHAP Mutual\n  Auth \"control\" \"control-secret\" \"controlled\" \"controlled-secret\"\n  Host 127.0.0.1\n  Port %d\n  TargetName %q\n  Lun 0\n  Flags \"rw\"\n  Size \"auto\"\n", g.control, g.name))
	g.config = write("istgt.conf", c.String())
}

func (g *istgt) Start() {
	g.t.Helper()
	g.run("istgt", "-D", "-c", g.config)
}

func (g *istgt) Sessions() int {
	out, err := exec.Command("istgtcontrol", "-c", filepath.Join(filepath.Dir(g.config), "control.conf"), "info").CombinedOutput()
	if err != nil {
		g.t.Fatalf("istgtcontrol: %v: %s", err, out)
	}
	g.t.Logf("%s", out)
	return strings.Count(string(out), "Login from")
}
