#!/bin/bash
# Runs under systemd in the emulated machine: installs the package, makes
# /dev/nbd0 of two LIO targets, restarts and upgrades the service under a
# verified load, kills and hangs the daemon, and removes the package. Exit code: /run/rc.
set -u
DEB=${DEB:?} DEB2=${DEB2:?}
. "$(dirname "$0")/lio.sh"
export DEBIAN_FRONTEND=noninteractive
rm -f /etc/multipath.conf
cat > /etc/mpathd.conf <<'CONF'
initiator {
	name iqn.2026-11.example:host
	target iscsi://127.0.0.1/iqn.2026-11.example:lab1/0
	target iscsi://127.0.0.2/iqn.2026-11.example:lab2/0
}
defaults {
	user_friendly_names yes
}
CONF
bad() { journalctl -u mpathd --no-pager -n 40; systemctl status mpathd --no-pager; finish 1 "$1"; }
dpkg -i "$DEB" || bad "the package does not install"
systemctl is-active mpathd || bad "the service does not run"
[ "$(systemctl is-enabled mpathd)" = enabled ] || bad "the service is not enabled"
another() { local p; p=$(systemctl show -P MainPID mpathd); [ "$p" != "$1" ] && [ "$p" != 0 ]; }
zgrep -q attach-connections /usr/share/man/man8/mpathd-run.8.gz && [ -s /usr/share/bash-completion/completions/mpathd ] || bad "no man page or no completion"
two() { mpathd show maps | grep -q ' 2/2 '; }
until_true two || bad "the map did not come up"
until_true grep -qx 1048576 /sys/block/nbd0/size || bad "/dev/nbd0 is not there"
mkfs.ext4 -q /dev/nbd0 && mkdir -p /run/mnt && mount /dev/nbd0 /run/mnt || bad "mkfs or mount failed"
fio --name=v --directory=/run/mnt --rw=randrw --bs=4k-64k --size=32m --io_size=96m --ioengine=psync --direct=1 --verify=crc32c --verify_fatal=1 --rate=4m,4m > /run/fio.log 2>&1 &
FIO=$!
sleep 2
systemctl restart mpathd || bad "restart failed"
until_true two || bad "the map did not come up after a restart"
sleep 2
mkdir -p /run/systemd/system/mpathd.service.d
printf '[Service]\nWatchdogSec=10s\nTimeoutAbortSec=3s\n' > /run/systemd/system/mpathd.service.d/lab.conf
dpkg -i "$DEB2" || bad "the upgrade does not install"
until_true two || bad "the map did not come up after an upgrade"
[ "$(dpkg-query -W -f '${Version}' mpathd)" = 9.9.9 ] || bad "the upgrade has another version"
say "handed over: $(journalctl -u mpathd --no-pager | grep -c 'device of an earlier run taken over')"
[ "$(journalctl -u mpathd --no-pager | grep -c 'device of an earlier run taken over')" = 2 ] || bad "restart and upgrade did not take the device over"
journalctl -u mpathd --no-pager | grep -qE 'sends its requests anew|not left with systemd' && bad "a device did not pass through systemd's store"
sleep 1
PID=$(systemctl show -P MainPID mpathd); kill -KILL "$PID"
until_true two || bad "the map did not come up after a crash"
[ "$(systemctl show -P MainPID mpathd)" != "$PID" ] || bad "not restarted"
# One that lives and does nothing: the watchdog, shortened by a drop-in since the upgrade.
PID=$(systemctl show -P MainPID mpathd); kill -STOP "$PID"
until_true another "$PID" || until_true another "$PID" || bad "a daemon that hangs is not restarted"
until_true two || bad "the map did not come up after the watchdog"
journalctl -u mpathd --no-pager | grep -i 'watchdog' | tail -2 | grep . || bad "it was not the watchdog that restarted the daemon"
wait $FIO || { cat /run/fio.log; bad "fio failed"; }
grep -E 'clat.*max|err=' /run/fio.log
dpkg -r mpathd && bad "the package was removed under a mounted file system"
until_true two || bad "the service did not go on after the refused removal"
umount /run/mnt || bad "umount failed"
e2fsck -fn /dev/nbd0 || bad "fsck found damage"
dpkg -r mpathd || bad "the package does not remove"
[ "$(cat /sys/block/nbd0/size 2>/dev/null || echo 0)" = 0 ] || bad "/dev/nbd0 is still attached"
[ -e /usr/sbin/mpathd ] && bad "the binary is still there"
dpkg -P mpathd; [ -e /var/lib/mpathd ] && bad "purge left state behind"
dmesg | grep -iE 'I/O error|EXT4-fs error' && bad "the kernel saw I/O errors"
finish 0 "package: passed"
