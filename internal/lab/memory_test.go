package lab

import (
	"strings"
	"testing"

	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/realtarget"
)

// TestMemoryPressure fills a machine of little memory with dirty pages of
// /dev/nbd0, whose target is outside of it, several times over: through a
// failover, a crash of the daemon, and a journal that nobody reads.
func TestMemoryPressure(t *testing.T) {
	long(t)
	g := realtarget.Start(t, "tgtd", realtarget.Options{Size: 768 << 20})
	var ports []string
	for range 2 { // ways to the target's one portal
		p, err := faultnet.New("127.0.0.1:0", g.Portals()[0])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		_, port, _ := strings.Cut(p.Addr(), ":")
		ports = append(ports, port)
	}
	boot(t, "memory.sh", 400, "LAB_MEMORY=256M", "LAB_NET=1", "MPATHD="+built(t, "../../cmd/mpathd"), "PORT1="+ports[0], "PORT2="+ports[1], "TARGET="+g.Name())
}
