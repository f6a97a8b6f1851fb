// Command gonbd attaches an NBD device with an independent client library:
// gonbd SOCKET EXPORT DEVICE. It runs until the device is detached.
package main

import (
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/pojntfx/go-nbd/pkg/client"
)

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "gonbd:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("usage: gonbd SOCKET EXPORT DEVICE")
	}
	conn, err := net.Dial("unix", args[1])
	if err != nil {
		return err
	}
	dev, err := os.OpenFile(args[3], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGTERM)
	go func() {
		<-sig
		client.Disconnect(dev)
	}()
	return client.Connect(conn, dev, &client.Options{ExportName: args[2], BlockSize: 512, OnConnected: func() { fmt.Println("attached", args[3]) }})
}
