package nbd

import (
	"crypto/tls"
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/nbd/proto"
)

func TestParseListeners(t *testing.T) {
	over := Access{TLS: TLSRequired, Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	ls, err := ParseListeners("unix:/run/a.sock, unix:/run/b.sock mode=0660 owner=root group=6 tls=required,tcp:[::1]:10809,tcp::10810 tls=off allow=192.168.1.7 allow=fd00::/8", over)
	require.NoError(t, err)
	require.Equal(t, []Listener{
		{Network: "unix", Address: "/run/a.sock", Mode: 0o600},
		{Network: "unix", Address: "/run/b.sock", Mode: 0o660, Owner: "root", Group: "6", Access: Access{TLS: TLSRequired}},
		{Network: "tcp", Address: "[::1]:10809", Mode: 0o600, Access: over},
		{Network: "tcp", Address: ":10810", Mode: 0o600, Access: Access{Allow: []netip.Prefix{netip.MustParsePrefix("192.168.1.7/32"), netip.MustParsePrefix("fd00::/8")}}},
	}, ls)
	for spec, want := range map[string]string{
		"":                             "want unix:PATH",
		"unix:":                        "want unix:PATH",
		"tcp:host":                     "want unix:PATH",
		"vsock:1:2":                    "want unix:PATH",
		"unix:/a,":                     "want unix:PATH",
		"unix:/a mode=0888":            `mode "0888"`,
		"unix:/a mode=01777":           `mode "01777"`,
		"unix:/a allow=10.0.0.0/8":     "allow=10.0.0.0/8",
		"tcp:a:1 mode=0660":            "mode=0660",
		"tcp:a:1 allow=10.0.0.0/33":    "want an address or a network",
		"tcp:a:1 tls=maybe":            "want tls=required|optional|off",
		"tcp:a:1 group=kvm":            "group=kvm",
		"unix:/a owner=":               "owner=",
		"tcp:a:1 tls=required cert=/x": "cert=/x",
	} {
		_, err := ParseListeners(spec, Access{})
		require.ErrorContains(t, err, want, "%q", spec)
	}
}

func TestTLSIsAMatterOfTheListener(t *testing.T) {
	c := Config{TLS: &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}}}
	asks := func(a Access, opt uint32, data []byte) uint32 {
		_, dial := tcpServer(t, c, a)
		p := dial()
		p.hello(3)
		p.Write(option(opt, data))
		_, typ, _ := p.reply()
		return typ
	}
	require.Equal(t, proto.RepErrTLSReqd, asks(Access{TLS: TLSRequired}, proto.OptGo, name("disk")))
	require.Equal(t, proto.RepInfo, asks(Access{TLS: TLSOptional}, proto.OptGo, name("disk")))
	require.Equal(t, proto.RepAck, asks(Access{TLS: TLSOptional}, proto.OptStartTLS, nil))
	require.Equal(t, proto.RepErrUnsup, asks(Access{}, proto.OptStartTLS, nil))
}

func TestWhatIsHiddenIsUnknown(t *testing.T) {
	w, err := ParseWithout([]string{"structured", "go"})
	require.NoError(t, err)
	_, _, dial := newServer(t, Config{Without: w})
	p := dial()
	p.hello(3)
	for _, opt := range []uint32{proto.OptGo, proto.OptInfo, proto.OptStructuredReply, proto.OptExtendedHeaders, proto.OptListMetaContext, proto.OptSetMetaContext} {
		p.Write(option(opt, name("disk")))
		_, typ, _ := p.reply()
		require.Equal(t, proto.RepErrUnsup, typ, opt)
	}
	_, err = ParseWithout([]string{"tls"})
	require.ErrorContains(t, err, "want structured")
}

// from is a connection of a client at an address.
type from struct {
	net.Conn
	at string
}

func (f from) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(f.at)) }

func TestAllowedNetworks(t *testing.T) {
	a := Access{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fe80::/64")}}
	for at, welcome := range map[string]bool{
		"10.1.2.3:1": true, "[::ffff:10.1.2.3]:1": true, "11.0.0.1:1": false,
		"[fe80::1%eth0]:1": true, "[fe80:0:0:1::1%eth0]:1": false,
	} {
		require.Equal(t, welcome, a.welcomes(from{at: at}), at)
	}
}
