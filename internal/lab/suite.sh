#!/bin/bash
# Runs inside the emulated machine as root: the compiled test suite SUITE with
# its arguments ARGS, over a kernel with LIO and NBD. The exit code goes to /run/rc.
set -u
export MPATHD=${MPATHD:?}
for m in nbd target_core_mod target_core_file target_core_iblock iscsi_target_mod; do
	modprobe $m || { echo "lab: no module $m"; echo 1 > /run/rc; exit 1; }
done
ip link set lo up
mount -t configfs none /sys/kernel/config 2>/dev/null
mkdir -p /var/target/pr /etc/target/pr # where LIO keeps reservations
mkdir -p /sys/kernel/config/target/iscsi /run/tmp
export TMPDIR=/run/tmp HOME=/root CI=
cd /run
# shellcheck disable=SC2086
"${SUITE:?}" $ARGS
rc=$?
[ $rc = 0 ] || dmesg | tail -40
echo $rc > /run/rc
