package initiator_test

import (
	"bytes"
	"context"
	"fmt"
	"log"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

// A block is written to the first unit of the first target of a portal, and read back.
func Example() {
	ctx := context.Background()
	portal, stop := ramDisk()
	defer stop()

	c := initiator.Config{Address: portal, InitiatorName: "iqn.2026-11.example:host"}
	found, err := initiator.Discover(ctx, c)
	if err != nil {
		log.Fatal(err)
	}
	c.TargetName = found.Targets[0].Name
	c.ISID = initiator.PathISID(c.InitiatorName, c.TargetName, c.Address)
	s, err := initiator.Open(ctx, c)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close(ctx)

	luns, err := initiator.ReportLUNs(ctx, s)
	if err != nil {
		log.Fatal(err)
	}
	lu, err := initiator.Identify(ctx, s, luns[0])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d blocks of %d bytes\n", lu.Blocks, lu.BlockSize)

	do := func(cmd *initiator.Command) {
		if err := s.Do(ctx, cmd); err != nil { // of the connection
			log.Fatal(err)
		}
		if st := cmd.Result.Status; st != scsi.StatusGood { // of the unit
			log.Fatal(scsi.StatusText(st), " ", scsi.ParseSense(cmd.Result.SenseData()))
		}
	}
	write := &initiator.Command{LUN: luns[0], Dir: initiator.DataOut, Data: bytes.Repeat([]byte("mpathd.\n"), lu.BlockSize/8)}
	scsi.Write(&write.CDB, 7, 1, false, lu.Use16)
	do(write)
	read := &initiator.Command{LUN: luns[0], Dir: initiator.DataIn, Data: make([]byte, lu.BlockSize)}
	scsi.Read(&read.CDB, 7, 1, lu.Use16)
	do(read)
	fmt.Print(string(read.Data[:8]))

	// Output:
	// 2048 blocks of 512 bytes
	// mpathd.
}

// ramDisk is a target with one unit of 1 MiB, and its portal.
func ramDisk() (portal string, stop func()) {
	lu, err := target.NewLU(1<<20, 512, target.DefaultIdentity("example"))
	if err != nil {
		log.Fatal(err)
	}
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: "iqn.2026-11.example:disk", LUs: []*target.LU{lu}}}})
	if err != nil {
		log.Fatal(err)
	}
	p, err := srv.Listen("127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	return p.Addr(), srv.Kill
}
