#!/bin/bash
# Runs inside the emulated machine as root: one LIO target with two portals, and
# 16 writes of 128 KiB at a time. One portal is cut and mended again and again: the
# LOGICAL UNIT RESET of the fence goes through the other one, beside those writes.
# The exit code goes to /run/rc.
set -u
MPATHD=${MPATHD:?} ROUNDS=${ROUNDS:-20}
. "$(dirname "$0")/lio.sh"
ip addr add 127.0.0.3/8 dev lo
mkdir "$T/iscsi/iqn.2026-11.example:lab1/tpgt_1/np/127.0.0.3:3260"
$MPATHD run --control /run/c.sock --nbd unix:/run/n.sock --state /run/state --alias lab --attach /dev/nbd0 --initiator iqn.2026-11.example:host \
	iscsi://127.0.0.1/iqn.2026-11.example:lab1/0 iscsi://127.0.0.3/iqn.2026-11.example:lab1/0 > /run/mpathd.log 2>&1 & PID=$!
both() { $MPATHD show maps --control /run/c.sock 2> /dev/null | grep -q ' 2/2 '; }
until_true both || finish 1 "the paths did not come up"
until_true test -e /dev/mpath/lab || finish 1 "/dev/nbd0 is not there"
fio --name=w --filename=/dev/nbd0 --rw=randwrite --bs=128k --iodepth=16 --ioengine=libaio --direct=1 --size=400m --time_based --runtime=3600 --eta=never --output-format=json --output=/run/fio.json & FIO=$!
sleep 2
for _ in $(seq "$ROUNDS"); do
	cut_path 1
	sleep 2
	mend_path 1
	until_true both || finish 1 "the path did not come back"
	sleep 1
done
kill -INT $FIO; wait $FIO
N=$(grep -c 'old session fenced' /run/mpathd.log)
[ "$N" -ge $((ROUNDS / 2)) ] || finish 1 "only $N fences: nothing was under way when the path died"
grep 'fence attempt failed\|still not fenced' /run/mpathd.log && finish 1 "a fence hung"
/usr/bin/python3 -c 'import json; s = open("/run/fio.json").read(); j = json.loads(s[s.index("{"):])["jobs"][0]; n = j["write"]["clat_ns"]; print("lab: writes took %.0f ms in the mean, %.0f ms at most" % (n["mean"] / 1e6, n["max"] / 1e6)); exit(j["error"] != 0 or n["max"] > 10e9)' || finish 1 "a write failed or took more than 10 s"
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
finish 0 "$ROUNDS failovers beside large writes, $N fences: passed"
