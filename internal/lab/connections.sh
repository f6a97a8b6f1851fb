#!/bin/bash
# Runs inside the emulated machine as root: /dev/nbd0 with two connections under
# verified writes. One of them dies, both paths fall silent for longer than the
# kernel waits, the daemon is replaced and killed. The exit code goes to /run/rc.
set -u
MPATHD=${MPATHD:?}
. "$(dirname "$0")/lio.sh"
mkdir -p /run/m
run() {
	exec $MPATHD run --control /run/m/c.sock --nbd unix:/run/m/n.sock --alias lab --attach-connections 3 --initiator iqn.2026-11.example:host "$@" \
		iscsi://127.0.0.1/iqn.2026-11.example:lab1/0 iscsi://127.0.0.2/iqn.2026-11.example:lab2/0 >> /run/mpathd.log 2>&1
}
two() { $MPATHD show maps --control /run/m/c.sock 2>/dev/null | grep -q ' 2/2 '; }
count() { grep -c "$1" /run/mpathd.log; }
replaced() { [ "$(count 'gave up a connection')" -ge "$1" ]; }
reconnected() { [ "$(dmesg | grep -c 'nbd0: reconnected socket')" -ge "$1" ]; }
# kill_one PID: shuts down the first of the daemon's ends of socket pairs.
kill_one() {
	/usr/bin/python3 - "$1" <<'PY'
import ctypes, os, socket, sys
libc, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
of = libc.syscall(434, pid, 0)  # pidfd_open
for fd in sorted(map(int, os.listdir("/proc/%d/fd" % pid))):
    if not os.readlink("/proc/%d/fd/%d" % (pid, fd)).startswith("socket:"):
        continue
    s = socket.socket(fileno=libc.syscall(438, of, fd, 0))  # pidfd_getfd
    try:
        if s.family == socket.AF_UNIX and s.type == socket.SOCK_STREAM and s.getsockname() == "" and s.getpeername() == "":
            s.shutdown(socket.SHUT_RDWR)
            print("lab: descriptor %d shut down" % fd)
            sys.exit()
    except OSError:
        pass
sys.exit("no connection of the kernel's found")
PY
}
run & PID=$!
until_true two || finish 1 "the map did not come up"
until_true grep -qx 1048576 /sys/block/nbd0/size || finish 1 "/dev/nbd0 is not there"
[ "$(ls /sys/block/nbd0/mq | wc -l)" = 2 ] || finish 1 "/dev/nbd0 has not a connection for each CPU"
[ "$(cat /sys/block/nbd0/queue/io_timeout)" = 30000 ] || finish 1 "the timer of several connections is not set"
echo 3000 > /sys/block/nbd0/queue/io_timeout # so that this takes less long
(until [ -e /run/enough ]; do
	fio --name=v --filename=/dev/nbd0 --rw=randwrite --bs=4k-64k --size=64m --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_state_save=0 --rate=8m || exit 1
done) > /run/fio.log 2>&1 &
FIO=$!
bad() { tail -20 /run/fio.log; finish 1 "$1"; }
sleep 2
kill_one $PID || bad "no connection to end"
until_true replaced 1 || bad "the daemon did not see that a connection died"
until_true reconnected 1 || bad "the kernel got no new connection"
sleep 1; kill -0 $FIO || bad "fio ended"
say "one dead connection of two is replaced"

cut_path 1; cut_path 2
until_true sh -c 'dmesg | grep -q "nbd0: Connection timed out"' || bad "the kernel did not lose its patience"
sleep 4
mend_path 1; mend_path 2
until_true two || bad "the paths did not come back"
until_true replaced 2 || bad "connections that were cut for slowness are not replaced"
sleep 2; kill -0 $FIO || bad "fio ended"
say "an outage longer than the kernel's timer: $(dmesg | grep -c 'Connection timed out') requests too late, $(count 'gave up a connection') connections replaced"

run --takeover & NEW=$!
wait $PID || bad "the old daemon ended with an error when it was replaced"
PID=$NEW
until_true two || bad "the map did not come up after the takeover"
until_true grep -q 'device of an earlier run taken over' /run/mpathd.log || bad "not taken over"
grep -q 'could not be handed over' /run/mpathd.log && bad "a connection was not handed over"
sleep 1
kill -KILL $PID; wait $PID 2>/dev/null
run & PID=$!
until_true two || bad "the map did not come up after a crash"
until_true sh -c '[ "$(grep -c "device of an earlier run taken over" /run/mpathd.log)" = 2 ]' || bad "not taken over after a crash"
[ "$(ls /sys/block/nbd0/mq | wc -l)" = 2 ] || bad "/dev/nbd0 has not its two connections any more"
touch /run/enough
wait $FIO || bad "fio failed"
$MPATHD detach lab --control /run/m/c.sock || finish 1 "detach failed"
BEFORE=$(count 'gave up a connection'); sleep 1
[ "$(count 'gave up a connection')" = "$BEFORE" ] || finish 1 "a device that was detached is reconnected"
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
dmesg | grep -iE 'I/O error' && finish 1 "the kernel saw I/O errors"
finish 0 "several connections: passed"
