package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"strings"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/nbd"
)

// tlsFiles is what the NBD server needs for TLS, and who may come at all.
type tlsFiles struct {
	Cert, Key, CA string
	Optional      bool
	Allow         []string
}

func (t *tlsFiles) apply(o *daemon.Options) error {
	for _, a := range t.Allow {
		p, err := nbd.ParsePrefix(a)
		if err != nil {
			return usageError{err}
		}
		o.Access.Allow = append(o.Access.Allow, p)
	}
	if t.Cert != "" {
		o.Access.TLS = nbd.TLSRequired
		if t.Optional {
			o.Access.TLS = nbd.TLSOptional
		}
	}
	if _, err := nbd.ParseListeners(o.NBD, o.Access); err != nil {
		return usageError{fmt.Errorf("--nbd: %w", err)}
	}
	if t.Cert == "" && t.Key == "" && t.CA == "" {
		return nil
	}
	if t.Cert == "" || t.Key == "" {
		return usageError{fmt.Errorf("TLS for NBD needs a certificate and its key: one is missing")}
	}
	st, err := os.Stat(t.Key)
	if err != nil {
		return fmt.Errorf("TLS key: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("TLS key %s: mode %04o lets others read it: chmod 600 %s", t.Key, st.Mode().Perm(), t.Key)
	}
	pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return fmt.Errorf("TLS certificate %s: %w", t.Cert, err)
	}
	o.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	if t.CA != "" {
		b, err := os.ReadFile(t.CA)
		if err != nil {
			return fmt.Errorf("TLS CA: %w", err)
		}
		o.TLS.ClientCAs = x509.NewCertPool()
		if !o.TLS.ClientCAs.AppendCertsFromPEM(b) {
			return fmt.Errorf("TLS CA %s: no certificate in it", t.CA)
		}
		o.TLS.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return nil
}

// configured takes what the nbd section says and no flag does.
func (t *tlsFiles) configured(s map[string]string, set func(string) bool) {
	for _, f := range []struct {
		key, flag string
		to        *string
	}{{"tls_cert", "nbd-tls-cert", &t.Cert}, {"tls_key", "nbd-tls-key", &t.Key}, {"tls_ca", "nbd-tls-ca", &t.CA}} {
		if v := s[f.key]; v != "" && !set(f.flag) {
			*f.to = v
		}
	}
	if !set("nbd-tls-optional") {
		t.Optional = s["tls_optional"] == "yes"
	}
	if v := s["allow"]; v != "" && !set("nbd-allow") {
		t.Allow = strings.FieldsFunc(v, func(r rune) bool { return r == ',' || r == ' ' })
	}
}
