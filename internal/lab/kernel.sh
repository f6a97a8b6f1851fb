#!/bin/bash
# Runs inside the emulated machine as root: one map out of a session of the
# kernel's initiator and one of mpathd's own to two LIO targets, I/O moving
# between them while fio verifies; a local disk (scsi_debug) as another map; a
# crash that leaves a kernel session behind. The exit code goes to /run/rc.
set -u
MPATHD=${MPATHD:?}
. "$(dirname "$0")/lio.sh"
K=iscsi://127.0.0.1/iqn.2026-11.example:lab1/0
U=iscsi://127.0.0.2/iqn.2026-11.example:lab2/0
$MPATHD wwid kernel+$K && finish 1 "a kernel path without iscsi_tcp"
modprobe -a sd_mod iscsi_tcp || finish 1 "no iscsi_tcp"
modprobe scsi_debug dev_size_mb=32 delay=0 add_host=1 || finish 1 "no scsi_debug"
until_true test -b /dev/sda || finish 1 "scsi_debug has no disk"
[ "$($MPATHD wwid kernel+$K)" = "$($MPATHD wwid $U)" ] || finish 1 "the IDs differ"
LAB=$($MPATHD wwid $U)
LOCAL=$($MPATHD wwid file:///dev/sda) || finish 1 "the local disk has no ID"
# The configuration with the given targets.
start() {
	{
		echo "initiator {"; echo " name iqn.2026-11.example:host"; printf ' target %s\n' "$@"; echo "}"
		echo "multipaths {"; echo " multipath {"; echo "  wwid $LAB"; echo "  alias lab"; echo "  nbd_device /dev/nbd0"; echo " }"
		echo " multipath {"; echo "  wwid $LOCAL"; echo "  alias local"; echo "  nbd_device /dev/nbd1"; echo " }"; echo "}"
	} > /run/lab.conf
	$MPATHD run --config /run/lab.conf --control /run/c.sock --nbd unix:/run/n.sock >> /run/mpathd.log 2>&1 &
	PID=$!
}
show() { $MPATHD show "$@" --control /run/c.sock; }
maps() { show maps | grep -qE "$1"; }
serving() { show paths | awk -v p="$1" '$1 == p && $3 == "up" && $4 == "true" {ok = 1} END {exit !ok}'; }
sessions() { ls /sys/class/iscsi_session 2>/dev/null | wc -l; }
ios() { show paths | awk -v p="$1" '$1 == p {print $6}'; }
KP=kernel+127.0.0.1:3260/0 UP=127.0.0.2:3260/0

start kernel+$K
until_true maps '^lab +ok .* 1/1 ' || finish 1 "the kernel path does not come up"
kill -KILL $PID; wait $PID 2>/dev/null
[ "$(sessions)" = 1 ] || finish 1 "a crash should leave its kernel session"
start kernel+$K $U file:///dev/sda
until_true maps '^lab +ok .* 2/2 ' || finish 1 "the map has not both paths"
until_true maps "^local +ok .* 1/1 " || finish 1 "the local disk has no map"
[ "$(sessions)" = 1 ] || finish 1 "$(sessions) kernel sessions instead of 1"
until_true grep -qx 1048576 /sys/block/nbd0/size || finish 1 "/dev/nbd0 is not there"
show topology
dd if=/dev/urandom of=/run/local.img bs=1M count=4 2>/dev/null
until_true grep -qx 65536 /sys/block/nbd1/size || finish 1 "/dev/nbd1 is not there"
dd if=/run/local.img of=/dev/nbd1 bs=64k oflag=direct conv=fsync 2>/dev/null || finish 1 "the local disk takes no writes"
cmp -n $((4*1024*1024)) /run/local.img /dev/sda || finish 1 "the local disk holds something else"
show maps --json | grep -E '"(url|portal|device|fence_test)"'

fio --name=v --filename=/dev/nbd0 --rw=randwrite --bs=4k-64k --size=96m --ioengine=libaio --iodepth=4 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --rate=4m,4m > /run/fio.log 2>&1 &
FIO=$!
until_true serving $KP || finish 1 "the kernel path does not serve"
sleep 1
cut_path 1; AT=$(date +%s%N)
until_true serving $UP || finish 1 "I/O did not move to our own session"
say "moved after $((($(date +%s%N) - AT) / 1000000)) ms"
B=$(ios $UP); sleep 1; [ "$(ios $UP)" -gt "$B" ] || finish 1 "no I/O on our own session"
mend_path 1
until_true serving $KP || finish 1 "I/O did not return to the kernel path"
$MPATHD switch lab 2 --control /run/c.sock || finish 1 "switch failed"
until_true serving $UP || finish 1 "the switch had no effect"
sleep 1
cut_path 2; AT=$(date +%s%N)
until_true serving $KP || finish 1 "I/O did not move to the kernel path"
say "moved after $((($(date +%s%N) - AT) / 1000000)) ms"
B=$(ios $KP); sleep 1; [ "$(ios $KP)" -gt "$B" ] || finish 1 "no I/O on the kernel path"
mend_path 2
until_true maps '^lab +ok .* 2/2 ' || finish 1 "our own session did not come back"
wait $FIO || { cat /run/fio.log; finish 1 "fio failed"; }
grep -E 'lat.*max|err=' /run/fio.log
show paths
[ "$(sessions)" = 1 ] || finish 1 "$(sessions) kernel sessions instead of 1"
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
[ "$(sessions)" = 0 ] || finish 1 "kernel sessions are left behind"
ls /sys/class/iscsi_connection /dev/sd* 2>/dev/null
dmesg | grep -E 'nbd0.*I/O error|I/O error.*nbd0' && finish 1 "the kernel saw I/O errors on /dev/nbd0"
grep -E 'WARN|ERROR' /run/mpathd.log | cut -c1-240
finish 0 "kernel and own sessions in one map: passed"
