#!/bin/bash
# Runs inside the emulated machine as root: mpathd makes /dev/nbd0 of two LIO
# targets; while fio verifies on a mounted file system the daemon is replaced
# several times by a new one that takes the device over. The exit code goes to /run/rc.
set -u
MPATHD=${MPATHD:?} ROUNDS=${ROUNDS:-4}
. "$(dirname "$0")/lio.sh"
mkdir -p /run/m
run() {
	exec $MPATHD run --control /run/m/c.sock --nbd unix:/run/m/n.sock --alias lab --initiator iqn.2026-11.example:host "$@" \
		iscsi://127.0.0.1/iqn.2026-11.example:lab1/0 iscsi://127.0.0.2/iqn.2026-11.example:lab2/0 >> /run/mpathd.log 2>&1
}
up() { for _ in $(seq 200); do $MPATHD show maps --control /run/m/c.sock 2>/dev/null | grep -q ' 2/2 ' && return 0; sleep 0.1; done; return 1; }
run & OLD=$!
up || finish 1 "the map did not come up"
for _ in $(seq 50); do [ "$(cat /sys/block/nbd0/size 2>/dev/null || echo 0)" -gt 0 ] && break; sleep 0.1; done
mkfs.ext4 -q /dev/nbd0 && mkdir -p /run/mnt && mount /dev/nbd0 /run/mnt || finish 1 "mkfs or mount failed"

(run) && finish 1 "a second daemon started beside the first one"
grep -q 'in use by a running daemon' /run/mpathd.log || finish 1 "the refusal of a second daemon does not say why"
$MPATHD detach lab --control /run/m/c.sock && finish 1 "a mounted device was detached"

# The load goes on, a verified pass after the other, until it is told that it was enough.
(until [ -e /run/enough ]; do
	fio --name=v --directory=/run/mnt --rw=randrw --bs=4k-64k --size=48m --ioengine=psync --direct=1 --verify=crc32c --verify_fatal=1 --rate=8m,8m || exit 1
done) > /run/fio.log 2>&1 &
FIO=$!
sleep 3
for n in $(seq "$ROUNDS"); do
	run --takeover & NEW=$!
	wait $OLD || finish 1 "the old daemon ended with an error when it was replaced"
	OLD=$NEW
	up || finish 1 "round $n: the map did not come up after the takeover"
	sleep 2
done
touch /run/enough
wait $FIO || { cat /run/fio.log; finish 1 "fio failed"; }
grep -E 'clat.*max|err=' /run/fio.log
grep -E 'handed over|taken over' /run/mpathd.log | head -20
[ "$(grep -c 'device of an earlier run taken over' /run/mpathd.log)" = "$ROUNDS" ] || finish 1 "not every takeover took the device"
grep -q 'could not be handed over' /run/mpathd.log && finish 1 "a device was not handed over between two requests"
MAX=$(grep -E '^ +clat' /run/fio.log | sed 's/.*(\(.\)sec).*max= *\([0-9.]*k\{0,1\}\),.*/\1 \2/' | awk '{v=$2; k=sub(/k/,"",v); v=v*(k?1000:1); if($1=="m") v*=1000; if($1=="n") v/=1000; if(v>m) m=v} END{print int(m/1000)}')
say "longest I/O over $ROUNDS takeovers: $MAX ms"
# Where a device is not handed over whole, the kernel sends its requests anew after 5 s.
[ "$MAX" -lt 5000 ] || finish 1 "an upgrade cost more than 5 s"

kill -TERM $OLD; wait $OLD || finish 1 "mpathd did not stop cleanly"
[ "$(cat /sys/block/nbd0/size)" -gt 0 ] || finish 1 "a mounted device was detached by SIGTERM"
$MPATHD detach /dev/nbd0 --control /run/m/c.sock && finish 1 "a mounted device was detached without a daemon"
run & OLD=$!
up || finish 1 "the map did not come up again"
umount /run/mnt || finish 1 "umount failed"
e2fsck -fn /dev/nbd0 || finish 1 "fsck found damage"
$MPATHD detach lab --control /run/m/c.sock || finish 1 "detach failed"
[ "$(cat /sys/block/nbd0/size)" = 0 ] || finish 1 "/dev/nbd0 is still attached"
kill -TERM $OLD; wait $OLD || finish 1 "mpathd did not stop cleanly"
dmesg | grep -iE 'I/O error|EXT4-fs error' && finish 1 "the kernel saw I/O errors"
finish 0 "upgrades of the daemon under load: passed"
