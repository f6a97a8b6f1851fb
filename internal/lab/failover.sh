#!/bin/bash
# Runs inside the emulated machine as root: LIO exports one file through two
# targets on two addresses; mpathd makes /dev/nbd0 of them; fio verifies on an
# ext4 file system while nft cuts one path. The exit code goes to /run/rc.
set -u
MPATHD=${MPATHD:?} GONBD=${GONBD:?}
. "$(dirname "$0")/lio.sh"
$MPATHD discover 127.0.0.1 || finish 1 "discovery failed"
start() {
	$MPATHD run --control /run/c.sock --nbd unix:/run/n.sock --alias lab --attach /dev/nbd0 --initiator iqn.2026-11.example:host \
		iscsi://127.0.0.1/iqn.2026-11.example:lab1/0 iscsi://127.0.0.2/iqn.2026-11.example:lab2/0 >> /run/mpathd.log 2>&1 &
	PID=$!
}
start
for _ in $(seq 100); do [ "$(cat /sys/block/nbd0/size 2>/dev/null || echo 0)" -gt 0 ] && break; sleep 0.1; done
[ "$(cat /sys/block/nbd0/size)" = 1048576 ] || finish 1 "/dev/nbd0 is not there"
for _ in $(seq 100); do $MPATHD show maps --control /run/c.sock | grep -q ' 2/2 ' && break; sleep 0.1; done
$MPATHD show topology --control /run/c.sock; cat /sys/block/nbd0/backend /sys/block/nbd0/queue/scheduler
mkfs.ext4 -q /dev/nbd0 && mkdir -p /run/mnt && mount /dev/nbd0 /run/mnt || finish 1 "mkfs or mount failed"
fio --name=v --directory=/run/mnt --rw=randwrite --bs=4k-64k --size=96m --ioengine=psync --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --rate=6m > /run/fio.log 2>&1 &
FIO=$!
sleep 4
cut_path 1
sleep 6
$MPATHD show paths --control /run/c.sock
$MPATHD show maps --control /run/c.sock | grep -q ' 1/2 ' || finish 1 "the cut was not noticed"
mend_path 1
wait $FIO || { cat /run/fio.log; finish 1 "fio failed"; }
grep -E 'lat.*max|err=' /run/fio.log
for _ in $(seq 200); do $MPATHD show maps --control /run/c.sock | grep -q ' 2/2 ' && break; sleep 0.1; done
$MPATHD show maps --control /run/c.sock | grep -q ' 2/2 ' || finish 1 "the path did not come back"
[ "$(readlink /dev/mpath/lab)" = /dev/nbd0 ] || finish 1 "/dev/mpath/lab is missing"
fio --name=k --directory=/run/mnt --rw=randwrite --bs=4k-64k --size=64m --ioengine=psync --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --rate=6m > /run/fio2.log 2>&1 &
FIO=$!
for _ in 1 2; do
	sleep 2
	kill -KILL $PID; wait $PID 2>/dev/null
	say "mpathd killed under load"
	sleep 0.5
	start
done
sleep 2
kill -USR2 $PID; wait $PID || finish 1 "mpathd did not leave cleanly"
say "mpathd left for an upgrade"
start
wait $FIO || { cat /run/fio2.log; finish 1 "fio failed when the daemon was killed"; }
grep -E 'lat.*max|err=' /run/fio2.log
grep -c 'device of an earlier run taken over' /run/mpathd.log
[ "$(grep -c 'device of an earlier run taken over' /run/mpathd.log)" = 3 ] || finish 1 "the device was not taken over three times"
umount /run/mnt || finish 1 "umount failed"
$GONBD /run/n.sock lab /dev/nbd1 > /run/gonbd.log 2>&1 &
G=$!
for _ in $(seq 100); do grep -q attached /run/gonbd.log && break; sleep 0.1; done
sync; echo 3 > /proc/sys/vm/drop_caches
A=$(dd if=/dev/nbd0 bs=1M count=64 iflag=direct 2>/dev/null | md5sum); B=$(dd if=/dev/nbd1 bs=1M count=64 iflag=direct 2>/dev/null | md5sum)
[ "$A" = "$B" ] && [ "$(cat /sys/block/nbd1/size)" = 1048576 ] || { cat /run/gonbd.log; finish 1 "/dev/nbd1 through go-nbd differs: $A $B"; }
say "/dev/nbd1 through go-nbd reads the same"
kill -TERM $G; wait $G
e2fsck -fn /dev/nbd0 || finish 1 "fsck found damage"
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
[ "$(cat /sys/block/nbd0/size)" = 0 ] || finish 1 "/dev/nbd0 was not detached"
dmesg | grep -iE 'I/O error|EXT4-fs error' && finish 1 "the kernel saw I/O errors"
finish 0 "failover on /dev/nbd0: passed"
