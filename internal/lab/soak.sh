#!/bin/bash
# Runs inside the emulated machine as root: verified writes and a mix of file
# operations on ext4 and then xfs on /dev/nbd0 over two LIO targets, while the
# daemon is killed every few seconds, for SECONDS_EACH each. Exit code: /run/rc.
set -u
MPATHD=${MPATHD:?} SECONDS_EACH=${SECONDS_EACH:-150}
UNMAP=1
. "$(dirname "$0")/lio.sh"
modprobe -a xfs ext4
mkdir -p /run/m /run/mnt
start() {
	$MPATHD run --control /run/m/c.sock --nbd unix:/run/m/n.sock --alias lab --attach /dev/nbd0 --initiator iqn.2026-11.example:host \
		iscsi://127.0.0.1/iqn.2026-11.example:lab1/0 iscsi://127.0.0.2/iqn.2026-11.example:lab2/0 >> /run/mpathd.log 2>&1 &
	PID=$!
}
two() { $MPATHD show maps --control /run/m/c.sock 2>/dev/null | grep -q ' 2/2 '; }
# What a file system's users do: files made, renamed, linked, cut, punched and
# removed; sums of all that stays are checked past the page cache.
files() {
	local dir=$1 end=$2 n=0 i
	while [ "$(date +%s)" -lt "$end" ]; do
		n=$((n + 1))
		rm -rf "$dir" && mkdir -p "$dir/a/b" || return 1
		for i in $(seq 12); do
			head -c $((i * 7919)) /dev/urandom > "$dir/a/$i" || return 1
			case $((i % 4)) in
			0) mv "$dir/a/$i" "$dir/a/b/$i" ;;
			1) ln "$dir/a/$i" "$dir/a/b/link$i" ;;
			2) truncate -s 4000 "$dir/a/$i" ;;
			3) fallocate -p -o 4096 -l 8192 "$dir/a/$i" ;;
			esac || return 1
		done
		(cd "$dir" && find . -type f -print0 | sort -z | xargs -0 md5sum) > "/run/sums" || return 1
		sync -f "$dir"; echo 1 > /proc/sys/vm/drop_caches
		(cd "$dir" && md5sum --quiet -c "/run/sums") || { say "a file changed"; return 1; }
	done
	echo "$n" > "/run/rounds"
}
# verified writes past the page cache, pass after pass
blocks() {
	local end=$1 n=0
	while [ "$(date +%s)" -lt "$end" ]; do
		fio --name=v --directory=/run/mnt --rw=randwrite --bs=4k-64k --size=48m --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 \
			--verify_state_save=0 --rate=12m --randseed=$n > /run/fio.log 2>&1 || { cat /run/fio.log; return 1; }
		n=$((n + 1))
		rm -f /run/mnt/v.*
		[ $((n % 2)) = 0 ] && fstrim /run/mnt
	done
	echo $n > /run/passes
}
start
until_true two || finish 1 "the map did not come up"
until_true test -b /dev/nbd0
KILLS=0
for FS in ext4 xfs; do
	blkdiscard -f /dev/nbd0 || finish 1 "blkdiscard failed"
	cmp -n $((64 << 20)) /dev/nbd0 /dev/zero || finish 1 "discarded blocks do not read as zeroes"
	mkfs.$FS -q "$([ $FS = xfs ] && echo -f || echo -F)" /dev/nbd0 && mount /dev/nbd0 /run/mnt || finish 1 "mkfs.$FS or mount failed"
	rm -f /run/rounds /run/passes
	END=$(($(date +%s) + SECONDS_EACH))
	files /run/mnt/tree $END & F=$!
	blocks $END & B=$!
	N=0
	while kill -0 $B 2>/dev/null && kill -0 $F 2>/dev/null && [ "$(date +%s)" -lt $END ]; do
		sleep $((4 + RANDOM % 5)).$((RANDOM % 10))
		kill -KILL $PID; wait $PID 2>/dev/null
		N=$((N + 1))
		sleep 0.$((RANDOM % 6))
		start
	done
	wait $B || finish 1 "verified writes failed on $FS after $N kills"
	wait $F || finish 1 "file operations failed on $FS after $N kills"
	fstrim -v /run/mnt || finish 1 "fstrim failed"
	umount /run/mnt || finish 1 "umount failed"
	if [ $FS = xfs ]; then xfs_repair -n /dev/nbd0 > /run/fsck.log 2>&1; else e2fsck -fn /dev/nbd0 > /run/fsck.log 2>&1; fi || { cat /run/fsck.log; finish 1 "$FS is damaged"; }
	say "$FS: $N kills in $SECONDS_EACH s, $(cat /run/passes) passes of 48 MiB verified, $(cat /run/rounds) rounds of file operations, clean"
	KILLS=$((KILLS + N))
done
dmesg | grep -iE 'I/O error|EXT4-fs error|XFS .*(error|corrupt|shutdown)' && finish 1 "the kernel saw I/O errors"
[ "$(grep -c 'device of an earlier run taken over' /run/mpathd.log)" -gt 0 ] || finish 1 "nothing was taken over"
until_true two || finish 1 "the map did not come up"
kill -TERM $PID; wait $PID || finish 1 "mpathd did not stop cleanly"
finish 0 "soak with $KILLS kills: passed"
