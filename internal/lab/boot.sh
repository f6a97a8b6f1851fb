#!/bin/bash
# Boots Debian's kernel in an emulated machine (no KVM needed) over this
# machine's root file system, read-only under a tmpfs overlay, and runs one
# script in it:  boot.sh [--systemd] SCRIPT [SECONDS]
# With --systemd, systemd is PID 1 and the script one of its services.
# The script writes its exit code to /run/rc; it is printed as VM-RC=N.
# LAB_MEMORY is the machine's memory (4G); with LAB_NET=1 it has a network
# interface, and reaches this machine's loopback ports as 10.0.2.2.
# The kernel is unpacked into a cache, never installed.
set -euo pipefail
here=$(realpath "${BASH_SOURCE[0]}")
systemd=
if [ "$1" = --systemd ]; then
	systemd=labsystemd=1
	shift
fi
script=$1 limit=${2:-120}
cache=${LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mpathd-lab}
mkdir -p "$cache"
if [ ! -e "$cache/kver" ]; then
	cd "$cache"
	apt-get update -qq
	pkg=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/{print $2; exit}')
	apt-get download -qq "$pkg" 2>/dev/null
	dpkg-deb -x "$pkg"_*.deb kernel
	rm -f "$pkg"_*.deb
	ls kernel/lib/modules > kver.new
	depmod -b "$PWD/kernel" "$(cat kver.new)"
	mv kver.new kver
fi
kver=$(cat "$cache/kver") kdir=$cache/kernel
initrd=$cache/initrd-$(md5sum < "$here" | cut -c1-8).gz # made by this very script
if [ ! -e "$initrd" ]; then
	tree=$(mktemp -d)
	mkdir -p "$tree/bin" "$tree/mods"
	cp "$(command -v busybox)" "$tree/bin/busybox"
	n=10
	for m in 9pnet_virtio 9p virtio_pci overlay; do
		modprobe -d "$kdir" -S "$kver" --show-depends $m
	done | awk '/insmod/ && !seen[$2]++ {print $2}' | while read -r f; do
		cp "$f" "$tree/mods/$n-$(basename "$f")"
		n=$((n + 1))
	done
	cat > "$tree/init" <<'INIT'
#!/bin/busybox sh
B=/bin/busybox
$B mkdir -p /proc /sys /dev /lower /upper /root
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
for m in /mods/*; do $B insmod $m; done
$B mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=512000 rootfs /lower
$B mount -t tmpfs tmpfs /upper; $B mkdir -p /upper/data /upper/work
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /root
for d in proc sys dev; do $B mount --move /$d /root/$d; done
$B ln -sfn /proc/self/fd /root/dev/fd
for i in 0:stdin 1:stdout 2:stderr; do $B ln -sf /proc/self/fd/${i%%:*} /root/dev/${i#*:}; done
$B mkdir -p /root/dev/pts /root/dev/shm; $B mount -t devpts devpts /root/dev/pts; $B mount -t tmpfs tmpfs /root/dev/shm
$B mount -t tmpfs tmpfs /root/run; $B mkdir -p /root/run/lock /root/lib/modules
word() { $B sed "s/.*$1=\([^ ]*\).*/\1/" /root/proc/cmdline; }
$B rm -rf /root/lib/modules/$($B uname -r); $B ln -sfn $(word labmods) /root/lib/modules/$($B uname -r)
if $B grep -q labsystemd=1 /root/proc/cmdline; then
	U=/root/etc/systemd/system
	$B rm -rf $U/*.wants; $B mkdir -p $U
	printf '[Unit]\nRequires=basic.target\nAfter=basic.target\n' > $U/lab.target
	printf '[Unit]\nAfter=basic.target\n[Service]\nType=exec\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/console\nEnvironment=HOME=/root TERM=dumb\nExecStart=%s\nExecStopPost=/bin/sh -c "echo VM-RC=$(cat /run/rc) > /dev/console; poweroff -ff"\n' "$(word labscript)" > $U/lab.service
	$B mkdir -p $U/lab.target.wants; $B ln -s ../lab.service $U/lab.target.wants/
	# This one would empty /tmp, where the script may be.
	for m in systemd-tmpfiles-setup.service systemd-tmpfiles-clean.timer; do $B ln -sf /dev/null $U/$m; done
	: > /root/etc/machine-id; : > /root/etc/fstab
	exec $B switch_root /root /lib/systemd/systemd --unit=lab.target
fi
exec $B switch_root /root /bin/busybox env -i HOME=/root TERM=dumb PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -c \
	"$(word labscript); echo VM-RC=\$(cat /run/rc 2>/dev/null); poweroff -f"
INIT
	chmod +x "$tree/init"
	(cd "$tree" && find . | cpio -o -H newc 2>/dev/null | gzip) > "$initrd.new"
	mv "$initrd.new" "$initrd"
	rm -rf "$tree"
fi
net="-nic none"
[ -n "${LAB_NET:-}" ] && net="-nic user,model=virtio-net-pci"
# shellcheck disable=SC2086
exec timeout "$limit" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m "${LAB_MEMORY:-4G}" $net -nographic -no-reboot \
	-virtfs "local,path=/,mount_tag=rootfs,security_model=none,readonly=on,multidevs=remap" \
	-kernel "$kdir/boot/vmlinuz-$kver" -initrd "$initrd" \
	-append "console=ttyS0 quiet panic=1 mitigations=off $systemd systemd.show_status=0 labmods=$kdir/lib/modules/$kver labscript=$script" </dev/null 2>&1
