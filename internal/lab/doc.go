// Package lab runs mpathd under real kernels in an emulator: LIO, the kernel's
// NBD client, ext4 and nft. boot.sh boots, failover.sh and kernel.sh are what runs inside.
package lab
