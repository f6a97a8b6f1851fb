package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mpathd/mpathd/internal/realtarget"
)

// certificates writes what GnuTLS's clients look for in dir, and the server's:
// ca-cert.pem, client-cert.pem, client-key.pem, server-cert.pem, server-key.pem.
func certificates(t *testing.T, dir string) {
	t.Helper()
	put := func(name, kind string, der []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
		parent, signer := ca, caKey
		if name == "ca" {
			c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
			parent, signer, ca, caKey = c, key, c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		put(name+"-cert.pem", "CERTIFICATE", der)
		k, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		put(name+"-key.pem", "PRIVATE KEY", k)
	}
}

// TestListenersDecideWhoComesIn: each listener has its own TLS, addresses and
// permissions, as libnbd and QEMU see them.
func TestListenersDecideWhoComesIn(t *testing.T) {
	t.Parallel()
	realtarget.Need(t, "nbdinfo", "qemu-io", "qemu-img")
	needLibnbd(t)
	pki, open := t.TempDir(), t.TempDir()
	certificates(t, pki)
	strangers, err := os.MkdirTemp("", "pki")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(strangers) })
	certificates(t, strangers) // of another CA
	os.Chmod(open, 0o755)
	os.Chmod(filepath.Dir(open), 0o755)
	must, may, never, closed := realtarget.FreePort(t), realtarget.FreePort(t), realtarget.FreePort(t), realtarget.FreePort(t)
	group, tls := filepath.Join(open, "group.sock"), filepath.Join(open, "tls.sock")
	newStackWith(t, "", "--nbd", "unix:"+filepath.Join(open, "own.sock")+
		fmt.Sprintf(", unix:%s mode=0660 group=65533, unix:%s tls=required", group, tls)+
		fmt.Sprintf(", tcp:127.0.0.1:%d tls=required, tcp:127.0.0.1:%d tls=optional, tcp:127.0.0.1:%d tls=off, tcp:127.0.0.1:%d tls=off allow=10.0.0.0/8 allow=127.0.0.2", must, may, never, closed),
		"--nbd-tls-cert", filepath.Join(pki, "server-cert.pem"), "--nbd-tls-key", filepath.Join(pki, "server-key.pem"), "--nbd-tls-ca", filepath.Join(pki, "ca-cert.pem"))
	at := func(port int) string { return fmt.Sprintf("//127.0.0.1:%d/xensan", port) }
	for _, c := range []struct {
		uri  string
		want bool
	}{
		{"nbd:" + at(must), false},
		{"nbds:" + at(must) + "?tls-certificates=" + pki, true},
		{"nbds:" + at(must) + "?tls-certificates=" + strangers + "&tls-verify-peer=false", false},
		{"nbd:" + at(may), true},
		{"nbds:" + at(may) + "?tls-certificates=" + pki, true},
		{"nbd:" + at(never), true},
		{"nbds:" + at(never) + "?tls-certificates=" + pki, false},
		{"nbd:" + at(closed), false},
		{"nbd+unix:///xensan?socket=" + group, true},
		{"nbd+unix:///xensan?socket=" + tls, false},
		{"nbds+unix://localhost/xensan?socket=" + tls + "&tls-certificates=" + pki, true},
	} {
		out, err := exec.Command("nbdinfo", "--size", c.uri).CombinedOutput()
		if got := err == nil && strings.TrimSpace(string(out)) == "268435456"; got != c.want {
			t.Errorf("nbdinfo %s: served %v, want %v: %v %s", c.uri, got, c.want, err, out)
		}
	}
	// From an address of the list the closed one serves.
	if out, err := exec.Command(systemPython, "-c", fmt.Sprintf(`import socket, nbd
s = socket.socket(); s.bind(("127.0.0.2", 0)); s.connect(("127.0.0.1", %d))
h = nbd.NBD(); h.set_export_name("xensan"); h.connect_socket(s.detach()); assert h.get_size() == 256 << 20`, closed)).CombinedOutput(); err != nil {
		t.Errorf("an allowed address is refused: %v %s", err, out)
	}
	out := run(t, "qemu-io", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+pki, "--image-opts",
		"-c", "write -P 9 0 4M", "-c", "read -P 9 0 4M", "-c", "flush",
		fmt.Sprintf("driver=nbd,server.type=inet,server.host=localhost,server.port=%d,export=xensan,tls-creds=t", must))
	if strings.Contains(out, "failed") || !strings.Contains(out, "read 4194304/4194304") {
		t.Errorf("qemu-io over TLS: %s", out)
	}
	// The group comes in, others do not.
	for _, c := range []struct {
		gid  uint32
		sock string
		want bool
	}{{65533, group, true}, {65534, group, false}, {65533, filepath.Join(open, "own.sock"), false}} {
		cmd := exec.Command("nbdinfo", "--size", "nbd+unix:///xensan?socket="+c.sock)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: c.gid}}
		if out, err := cmd.CombinedOutput(); (err == nil) != c.want {
			t.Errorf("group %d at %s: %v %s, want %v", c.gid, c.sock, err, out, c.want)
		}
	}

	for spec, want := range map[string]string{
		"unix:/tmp/x.sock owner=nobody-at-all": "there is no such user",
		"tcp:127.0.0.1:1 tls=required":         "there is no certificate",
		"tcp:127.0.0.1:1 mode=0660":            "mode=0660",
	} {
		out, err := exec.Command(binary, "run", "--attach", "none", "--control", filepath.Join(open, "c2.sock"), "--nbd", spec, "--initiator", "iqn.a:b", "iscsi://127.0.0.1/iqn.a:b/0").CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("--nbd %q: %v, want %q: %s", spec, err, want, out)
		}
	}
}
