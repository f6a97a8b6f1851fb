#!/bin/bash
# Runs inside the emulated machine as root: two disks, two daemons and a device
# that was taken away behind a daemon's back; nobody gets what is another's.
# The exit code goes to /run/rc.
set -u
MPATHD=${MPATHD:?}
. "$(dirname "$0")/lio.sh"
modprobe -r nbd; modprobe nbd nbds_max=4
mkdir -p /run/m
LAB=iscsi://127.0.0.1/iqn.2026-11.example:lab1/0 RAM=iscsi://127.0.0.3/iqn.2026-01.io.mpathd:ram/0
ip addr add 127.0.0.3/8 dev lo
$MPATHD target --portal 127.0.0.3:3260 --size 64M > /run/target.log 2>&1 &
until_true $MPATHD wwid $RAM > /run/wwid.ram || finish 1 "no target"
WWID=$($MPATHD wwid $LAB) || finish 1 "no LIO"
is() { [ "$(cat "/sys/block/nbd$1/size")" = "$2" ]; } # DEVICE SECTORS
leads() { [ "$(readlink "/dev/mpath/$1")" = "$2" ]; }
cat > /run/m/conf <<CONF
initiator {
	name iqn.2026-11.example:host
	target $RAM
	target $LAB
}
nbd { 
	listen unix:/run/m/n.sock
}
multipaths {
	multipath {
		wwid $(cat /run/wwid.ram)
		alias ram
	}
	multipath {
		wwid $WWID
		alias lab
		nbd_device /dev/nbd0
	}
}
CONF
run() { exec $MPATHD run --config /run/m/conf --control /run/m/c.sock >> /run/mpathd.log 2>&1; }
other() { exec $MPATHD run --control /run/m/c2.sock --nbd unix:/run/m/n2.sock --state /run/m/s2 --alias other --initiator iqn.2026-11.example:other --attach "$1" $RAM >> /run/other.log 2>&1; }

# A device that the configuration gives to a map is not for the first that comes.
cut_path 1
run & PID=$!
until_true test -e /dev/mpath/ram || finish 1 "the map did not come up"
mend_path 1
until_true leads lab /dev/nbd0 || finish 1 "a map's own device is $(readlink /dev/mpath/ram), another's"
leads ram /dev/nbd1 || finish 1 "the other map has $(readlink /dev/mpath/ram)"
say "a map has its own device"

# A device that was taken away behind the daemon's back, and is somebody else's now.
nbdkit -U /run/other.sock memory 16M || finish 1 "nbdkit failed"
timeout 20 nbd-client -d /dev/nbd1
until_true is 1 0 || finish 1 "nbd-client did not take the device away"
timeout 20 nbd-client -unix /run/other.sock -N other /dev/nbd1 > /run/nbd-client.log 2>&1 || { cat /run/nbd-client.log; finish 1 "nbd-client failed"; }
until_true is 1 32768 || finish 1 "nbd-client has no device"
$MPATHD detach ram --control /run/m/c.sock || finish 1 "detach failed"
is 1 32768 || finish 1 "somebody else's device was detached"
[ -e /dev/mpath/ram ] && finish 1 "the map's link is still there"
timeout 20 nbd-client -d /dev/nbd1
say "somebody else's device is left alone"

# The same, and it is another daemon's now, which dies and comes back.
timeout 20 nbd-client -d /dev/nbd0
until_true is 0 0 || finish 1 "nbd-client did not take the device away"
other /dev/nbd0 & OTHER=$!
until_true leads other /dev/nbd0 || { cat /run/other.log; finish 1 "the other daemon has no device"; }
kill -KILL $OTHER; wait $OTHER 2>/dev/null
other /dev/nbd0 & OTHER=$!
until_true grep -q 'device of an earlier run taken over' /run/other.log || { cat /run/other.log; finish 1 "the other daemon did not get its device back"; }
timeout 20 dd if=/dev/nbd0 bs=1M count=4 iflag=direct of=/dev/null 2>/dev/null || finish 1 "the device does not answer"
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
is 0 131072 || finish 1 "the other daemon's device was detached"
$MPATHD detach /dev/nbd0 --control /run/m/none.sock 2>&1 | grep -q "process $OTHER serves it" || finish 1 "it is not said who serves the device"
is 0 131072 || finish 1 "a device that is served was detached"
kill -TERM $OTHER; wait $OTHER || finish 1 "the other daemon did not stop cleanly"
is 0 0 || finish 1 "the device stays"
say "another daemon's device is left alone"

# The configuration has no path to a device of an earlier run any more.
other /dev/nbd0 & OTHER=$!
until_true leads other /dev/nbd0 || finish 1 "no device"
dd if=/dev/nbd0 bs=1M count=1 iflag=direct of=/dev/null 2>/dev/null || finish 1 "the device does not answer" # as udev does
kill -KILL $OTHER; wait $OTHER 2>/dev/null
RAM=$LAB; other none & OTHER=$!
until_true grep -q 'nobody serves.*/dev/nbd0' /run/other.log || finish 1 "nobody says that the device waits"
$MPATHD detach /dev/nbd0 --control /run/m/none.sock || finish 1 "the device cannot be detached"
is 0 0 || finish 1 "the device stays"
kill -TERM $OTHER; wait $OTHER || finish 1 "the other daemon did not stop cleanly"
say "a device that is left over is named"
finish 0 "owners: passed"
