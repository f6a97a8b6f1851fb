#!/bin/bash
# Runs inside an emulated machine of little memory as root: /dev/nbd0 out of two
# portals of a target outside, dirty pages of it far beyond the memory, and one
# path cut and the daemon killed meanwhile. The exit code goes to /run/rc.
set -u
MPATHD=${MPATHD:?} PORT1=${PORT1:?} PORT2=${PORT2:?} TARGET=${TARGET:?}
say() { echo "lab: $*"; }
finish() {
	say "$2"
	echo "$1" > /run/rc
	[ "$1" = 0 ] || { tail -20 /run/mpathd.log; dmesg | tail -60; }
	exit "$1"
}
until_true() { for _ in $(seq 40); do "$@" && return; sleep 1; done; return 1; }
modprobe -a nbd virtio_net nf_tables || finish 1 "modules are missing"
ip link set lo up
IF=$(ls /sys/class/net | grep -v lo | head -1)
ip link set "$IF" up && ip addr add 10.0.2.15/24 dev "$IF" || finish 1 "no network"
mkdir -p /run/m
start() {
	# Nobody reads the messages of the run that has to live through the worst.
	$MPATHD run --control /run/m/c.sock --nbd unix:/run/m/n.sock --alias lab --attach /dev/nbd0 --initiator iqn.2026-11.example:host \
		"iscsi://10.0.2.2:$PORT1/$TARGET/1" "iscsi://10.0.2.2:$PORT2/$TARGET/1" 2> "$1" &
	PID=$!
}
paths() { $MPATHD show maps --control /run/m/c.sock 2>/dev/null | grep -q " $1/2 "; }
mem() { awk -v p="$1" '/^(MemTotal|MemFree|Dirty|Writeback):/ {printf "%s %d MiB  ", $1, $2/1024} END {print p}' /proc/meminfo; }
dirty() { awk '/^(Dirty|Writeback):/ {n += $2} END {print int(n/1024)}' /proc/meminfo; }

mkfifo /run/silent
exec 8<> /run/silent # open, never read
start /run/silent
until_true paths 2 || finish 1 "the map did not come up"
until_true test "$(cat /sys/block/nbd0/size)" -gt 0 || finish 1 "/dev/nbd0 is not there"
grep -E 'VmLck|VmRSS|VmHWM' /proc/$PID/status
# Each thread is one that memory is written back through (PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE).
for t in /proc/$PID/task/*; do
	F=$(awk '{print $9}' "$t/stat")
	[ $((F & 0x180000)) = $((0x180000)) ] || finish 1 "thread $t has flags $F: it may wait for itself"
done
[ "$(awk '/VmLck/ {print $2}' /proc/$PID/status)" -gt 16384 ] || finish 1 "the buffers are not locked"

[ "$(cat /proc/$PID/oom_score_adj)" = -1000 ] || finish 1 "mpathd may be killed for memory"
# Let dirty pages take more than a kernel lets them, and leave the rest little room.
echo 60 > /proc/sys/vm/dirty_ratio; echo 50 > /proc/sys/vm/dirty_background_ratio
dd if=/dev/zero of=/dev/shm/ballast bs=1M count=24 2>/dev/null
mem "before"
JOB="--name=v --filename=/dev/nbd0 --bs=1m --verify_interval=64k --size=400m --ioengine=psync --verify=crc32c --verify_pattern=0x5a --randseed=7"
fio $JOB --rw=write --do_verify=0 --end_fsync=1 > /run/fio.log 2>&1 &
FIO=$!
BEGAN=$(date +%s)
PEAK=0
for n in $(seq 120); do
	D=$(dirty); [ "$D" -gt "$PEAK" ] && PEAK=$D
	case $n in
	6)
		mem "when path 1 is cut"
		nft add table ip lab; nft add chain ip lab in '{ type filter hook input priority 0; }'
		nft add chain ip lab out '{ type filter hook output priority 0; }'
		nft add rule ip lab in tcp sport "$PORT1" drop; nft add rule ip lab out tcp dport "$PORT1" drop
		;;
	12) until_true paths 1 || finish 1 "the cut was not noticed"; mem "after the failover" ;;
	18)
		# Without a daemon nothing is written: here the kernel's own limits must do.
		echo 20 > /proc/sys/vm/dirty_ratio; echo 10 > /proc/sys/vm/dirty_background_ratio
		mem "when mpathd is killed"
		kill -KILL $PID; wait $PID 2>/dev/null
		start /run/mpathd.log
		;;
	26) nft delete table ip lab; mem "path 1 is back" ;;
	esac
	kill -0 $FIO 2>/dev/null || break
	sleep 1
done
kill -0 $FIO 2>/dev/null && { cat /proc/$PID/task/*/wchan; echo; cat /proc/$FIO/stack; finish 1 "the load does not end: a deadlock?"; }
wait $FIO || { cat /run/fio.log; finish 1 "fio failed"; }
say "400 MiB written in $(($(date +%s) - BEGAN)) s; most dirty at a time: $PEAK MiB"
[ "$n" -gt 20 ] || finish 1 "the load ended before the daemon was killed"
[ "$PEAK" -gt 50 ] || finish 1 "memory was not full of dirty pages"
until_true paths 2 || finish 1 "path 1 did not come back"
grep -c 'device of an earlier run taken over' /run/mpathd.log
echo 3 > /proc/sys/vm/drop_caches
fio $JOB --rw=read --direct=1 --verify_fatal=1 > /run/fio2.log 2>&1 || { cat /run/fio2.log; finish 1 "what was written is not there"; }
mem "after"
dmesg | grep -iE 'I/O error|Out of memory|oom-kill|allocation failure' && finish 1 "the kernel complains"
dmesg | grep -i 'blocked for' && say "(a task was told to be blocked for long)"
grep -E 'VmLck|VmRSS|VmHWM' /proc/$PID/status
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
finish 0 "memory pressure: passed"
