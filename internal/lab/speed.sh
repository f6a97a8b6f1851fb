#!/bin/bash
# Runs inside the emulated machine as root: the same two LIO targets through
# open-iscsi and dm-multipath, and through mpathd on /dev/nbd0, in turns; with
# SETTINGS=1 instead /dev/nbd0 with one setting after the other. Lines that begin
# with "row" are results: load, device, IOPS, MiB/s.
set -u
MPATHD=${MPATHD:?} ROUNDS=${ROUNDS:-3} RUNTIME=${RUNTIME:-2}
. "$(dirname "$0")/lio.sh"
modprobe -a sd_mod iscsi_tcp dm-multipath dm-service-time || finish 1 "modules are missing"
mkdir -p /run/m /etc/iscsi
echo InitiatorName=iqn.2026-11.example:peer > /etc/iscsi/initiatorname.iscsi
iscsid || finish 1 "iscsid does not start"
for i in 1 2; do
	iscsiadm -m discovery -t st -p 127.0.0.$i > /dev/null || finish 1 "discovery by iscsiadm failed"
done
iscsiadm -m node -l > /dev/null || finish 1 "login by iscsiadm failed"
until_true test -b /dev/sdb || finish 1 "no disks"
for d in sda sdb; do echo none > /sys/block/$d/queue/scheduler; done
dmsetup create peer --table "0 1048576 multipath 1 queue_if_no_path 0 2 1 service-time 0 1 1 $(cat /sys/block/sda/dev) 1 service-time 0 1 1 $(cat /sys/block/sdb/dev) 1" || finish 1 "no multipath device"
dmsetup mknodes
$MPATHD run --control /run/m/c.sock --nbd unix:/run/m/n.sock --alias lab --attach /dev/nbd0 --initiator iqn.2026-11.example:host \
	iscsi://127.0.0.1/iqn.2026-11.example:lab1/0 iscsi://127.0.0.2/iqn.2026-11.example:lab2/0 > /run/mpathd.log 2>&1 &
PID=$!
two() { $MPATHD show maps --control /run/m/c.sock 2>/dev/null | grep -q ' 2/2 '; }
until_true two || finish 1 "the map did not come up"
until_true grep -qx 1048576 /sys/block/nbd0/size || finish 1 "/dev/nbd0 is not there"
dd if=/dev/urandom of=/run/lio.img bs=1M count=512 conv=notrunc 2>/dev/null # no holes

# job NAME DEVICE LABEL: prints a row of what fio does there
job() {
	case $1 in
	"4 KiB read, depth 32") set -- "$@" --rw=randread --bs=4k --iodepth=32 ;;
	"4 KiB write, depth 32") set -- "$@" --rw=randwrite --bs=4k --iodepth=32 ;;
	"4 KiB read, depth 1") set -- "$@" --rw=randread --bs=4k --iodepth=1 ;;
	"1 MiB read, depth 4") set -- "$@" --rw=read --bs=1m --iodepth=4 ;;
	"1 MiB write, depth 4") set -- "$@" --rw=write --bs=1m --iodepth=4 ;;
	esac
	local name=$1 dev=$2 label=$3
	shift 3
	fio --name=s --filename="$dev" --direct=1 --ioengine=libaio --size=512m --runtime="$RUNTIME" --ramp_time=1 --time_based --output-format=terse --terse-version=3 "$@" 2>/dev/null |
		awk -F';' -v n="$name" -v l="$label" '{i = $8 + $49; b = ($7 + $48) / 1024; printf "row|%s|%s|%.0f|%.1f\n", n, l, i, b}'
}
done_with() { kill -TERM $PID; wait $PID; finish 0 "speed: measured"; }
if [ -z "${SETTINGS:-}" ]; then
	for _ in $(seq "$ROUNDS"); do
		for n in "4 KiB read, depth 1" "4 KiB read, depth 32" "4 KiB write, depth 32" "1 MiB read, depth 4" "1 MiB write, depth 4"; do
			job "$n" /dev/mapper/peer dm-multipath
			job "$n" /dev/nbd0 mpathd
		done
	done
	done_with
fi
both() { job "4 KiB read, depth 32" "$1" "$2"; job "1 MiB read, depth 4" "$1" "$2"; job "1 MiB write, depth 4" "$1" "$2"; }
Q=/sys/block/nbd0/queue
both /dev/nbd0 "as attached"
echo mq-deadline > $Q/scheduler; both /dev/nbd0 "scheduler mq-deadline"; echo none > $Q/scheduler
for s in 128 4096; do echo $s > $Q/max_sectors_kb; both /dev/nbd0 "max_sectors_kb $s"; done
echo 1024 > $Q/max_sectors_kb
for c in 1 2 4; do
	nbd-client -unix /run/m/n.sock -N lab /dev/nbd2 -C $c > /run/nbd-client.log 2>&1 || { cat /run/nbd-client.log; finish 1 "nbd-client failed"; }
	until_true grep -qx 1048576 /sys/block/nbd2/size
	echo none > /sys/block/nbd2/queue/scheduler; echo 1024 > /sys/block/nbd2/queue/max_sectors_kb
	both /dev/nbd2 "$c connections of nbd-client"
	nbd-client -d /dev/nbd2 > /dev/null; sleep 1
done
both /dev/nbd0 "as attached, again"
done_with
