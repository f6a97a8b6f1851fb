#!/bin/bash
# Runs inside the emulated machine as root: what can be wrong with a kernel
# device is said, partitions and growth under a mount work, and the stock
# nbd-client attaches too. The exit code goes to /run/rc.
set -u
MPATHD=${MPATHD:?}
LOOP=1 UNMAP=1
# Before the module is there.
mkdir -p /run/m
URLS="iscsi://127.0.0.1/iqn.2026-11.example:lab1/0 iscsi://127.0.0.2/iqn.2026-11.example:lab2/0"
run() { exec $MPATHD run --control /run/m/c.sock --nbd unix:/run/m/n.sock --alias lab --initiator iqn.2026-11.example:host "$@" $URLS >> /run/mpathd.log 2>&1; }
(run --attach /dev/nbd0) && { echo "attached without the module"; echo 1 > /run/rc; exit 1; }
grep -q 'the nbd module is not loaded: run' /run/mpathd.log || { cat /run/mpathd.log; echo 1 > /run/rc; exit 1; }
rm /run/mpathd.log
modprobe nbd max_part=16 nbds_max=4
. "$(dirname "$0")/lio.sh"
two() { $MPATHD show maps --control /run/m/c.sock 2>/dev/null | grep -q ' 2/2 '; }
says() { grep -q "$1" /run/mpathd.log || finish 1 "not said: $1"; }

# /dev/nbd0 is somebody else's.
nbdkit -U /run/other.sock memory 16M || finish 1 "nbdkit failed"
timeout 20 nbd-client -unix /run/other.sock -N other /dev/nbd0 > /run/nbd-client.log 2>&1 || { cat /run/nbd-client.log; finish 1 "nbd-client failed"; }
say "/dev/nbd0 is somebody else's"
run --attach /dev/nbd0 & PID=$!
until_true grep -q '/dev/nbd0.*in use' /run/mpathd.log || finish 1 "it is not said that the device is in use"
[ "$(cat /sys/block/nbd0/size)" = 32768 ] || finish 1 "somebody else's device was changed"
$MPATHD detach /dev/nbd0 && finish 1 "somebody else's device was detached"
$MPATHD detach /dev/nbd0 2>&1 | grep -q 'is not attached by mpathd' || finish 1 "no clear words for somebody else's device"
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
timeout 20 nbd-client -d /dev/nbd0
say "refusals are clear"

# Partitions and their survival.
run --attach /dev/nbd0 & PID=$!
until_true two || finish 1 "the map did not come up"
until_true grep -qx 1048576 /sys/block/nbd0/size || finish 1 "/dev/nbd0 is not there"
[ "$(readlink /dev/mpath/lab)" = /dev/nbd0 ] || finish 1 "/dev/mpath/lab is missing"
parted -s /dev/mpath/lab mklabel gpt mkpart a ext4 1MiB 200MiB mkpart b 200MiB 400MiB || finish 1 "parted failed"
until_true test -b /dev/nbd0p2 || finish 1 "no partitions"
mkdir -p /run/mnt; mkfs.ext4 -q /dev/nbd0p1 && mount /dev/nbd0p1 /run/mnt || finish 1 "mkfs or mount failed"
dd if=/dev/urandom of=/run/mnt/file bs=1M count=20 2>/dev/null; SUM=$(md5sum < /run/mnt/file)
dd if=/run/mnt/file of=/dev/nbd0p2 bs=1M oflag=direct 2>/dev/null
$MPATHD detach lab --control /run/m/c.sock 2>&1 | grep -q 'nbd0p1 is mounted on /run/mnt' || finish 1 "a mounted partition does not keep the device"
kill -KILL $PID; wait $PID 2>/dev/null
run --attach /dev/nbd0 & PID=$!
until_true two || finish 1 "the map did not come up after a crash"
until_true grep -q 'device of an earlier run taken over' /run/mpathd.log || finish 1 "not taken over"
[ "$(md5sum < /run/mnt/file)" = "$SUM" ] && sync && [ -b /dev/nbd0p2 ] || finish 1 "partitions after a crash"

# A crash loop: most runs end before the map is up.
for n in 1 2 4 8 16; do
	kill -KILL $PID; wait $PID 2>/dev/null
	run --attach /dev/nbd0 & PID=$!
	sleep "$(awk "BEGIN {print $n / 10}")"
done
until_true two || finish 1 "the map did not come up after a crash loop"
echo 1 > /proc/sys/vm/drop_caches
[ "$(md5sum < /run/mnt/file)" = "$SUM" ] && sync || finish 1 "the file after a crash loop"
say "a crash loop is survived"

# A second daemon of the same disk leaves the device to the first.
$MPATHD run --control /run/m/c2.sock --nbd unix:/run/m/n2.sock --state /run/m/s2 --alias second --initiator iqn.2026-11.example:second --attach /dev/nbd1 $URLS > /run/second.log 2>&1 & SECOND=$!
until_true grep -q "adopt /dev/nbd0: process $PID serves it" /run/second.log || { cat /run/second.log; finish 1 "a second daemon of the disk is not refused"; }
grep -q 'taken over' /run/second.log && finish 1 "a second daemon took the device of the first"
dd if=/run/mnt/file of=/dev/nbd0p2 bs=1M oflag=direct 2>/dev/null && two || finish 1 "the first daemon was disturbed"
kill -TERM $SECOND; wait $SECOND || finish 1 "the second daemon did not stop cleanly"
[ "$(md5sum < /run/mnt/file)" = "$SUM" ] && [ "$(readlink /dev/mpath/lab)" = /dev/nbd0 ] || finish 1 "the device after a second daemon"
grep -q 'the kernel gave up a connection' /run/mpathd.log && finish 1 "the first daemon lost the device"
say "a second daemon is refused"

# The configuration changed while no daemon ran: another alias, a path less.
kill -KILL $PID; wait $PID 2>/dev/null
ALL=$URLS URLS=${URLS% *}
run --attach /dev/nbd0 --alias other & PID=$!
until_true sh -c '[ "$(readlink /dev/mpath/other)" = /dev/nbd0 ]' || finish 1 "the device has not its new name"
[ -e /dev/mpath/lab ] && finish 1 "the device has its old name too"
dd if=/run/mnt/file of=/dev/nbd0p2 bs=1M oflag=direct 2>/dev/null && sync || finish 1 "no writes after the configuration changed"
URLS=$ALL
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
run --attach /dev/nbd0 & PID=$!
until_true two || finish 1 "the map did not come up after the configuration changed back"
until_true sh -c '[ "$(readlink /dev/mpath/lab)" = /dev/nbd0 ]' || finish 1 "the device has not its old name again"
say "a changed configuration is followed"

# The unit grows under the mounted partition.
truncate -s 768M /run/lio.img; losetup -c /dev/loop0
until_true sh -c "$MPATHD resize lab --control /run/m/c.sock >/dev/null 2>&1; grep -qx 1572864 /sys/block/nbd0/size" || finish 1 "the device did not grow: $(cat /sys/block/nbd0/size)"
dd if=/run/mnt/file of=/dev/nbd0 bs=1M seek=700 count=20 oflag=direct conv=notrunc 2>/dev/null || finish 1 "no writes beyond the old end"
[ "$(dd if=/dev/nbd0 bs=1M skip=700 count=20 iflag=direct 2>/dev/null | md5sum)" = "$SUM" ] || finish 1 "other bytes beyond the old end"
[ "$(md5sum < /run/mnt/file)" = "$SUM" ] || finish 1 "the file changed"
dmesg | grep -iE 'nbd0.*detected capacity change'

# The stock client on its own way to the same export.
for how in "" -nonetlink; do
	for c in 1 4; do
		timeout 20 nbd-client -unix /run/m/n.sock -N lab /dev/nbd2 -C $c -timeout 30 -persist $how > /run/nbd-client.log 2>&1 || { cat /run/nbd-client.log; finish 1 "nbd-client $how failed"; }
		until_true grep -qx 1572864 /sys/block/nbd2/size || finish 1 "nbd-client $how: no device"
		[ "$(dd if=/dev/nbd2 bs=1M skip=700 count=20 iflag=direct 2>/dev/null | md5sum)" = "$SUM" ] || finish 1 "nbd-client $how reads other bytes"
		fio --name=c --filename=/dev/nbd2 --offset=500m --size=32m --rw=randwrite --bs=4k-64k --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_state_save=0 > /run/fio.log 2>&1 || { cat /run/fio.log; finish 1 "fio through nbd-client failed"; }
		timeout 20 nbd-client -d /dev/nbd2 || finish 1 "nbd-client $how does not detach"
		until_true grep -qx 0 /sys/block/nbd2/size || finish 1 "nbd-client $how: the device stays"
		say "nbd-client $how with $c connections: fine"
	done
done
umount /run/mnt && e2fsck -fn /dev/nbd0p1 > /dev/null 2>&1 || finish 1 "umount or fsck failed"
$MPATHD detach lab --control /run/m/c.sock || finish 1 "detach failed"
[ -e /dev/mpath/lab ] && finish 1 "/dev/mpath/lab is still there"
[ "$(cat /sys/block/nbd0/size)" = 0 ] || finish 1 "/dev/nbd0 is still attached"
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
dmesg | grep -iE 'I/O error|EXT4-fs error' | grep -v nbd2 && finish 1 "the kernel saw I/O errors"
finish 0 "the device: passed"
