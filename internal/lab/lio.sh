# Sourced inside the emulated machine: LIO exports one file through two targets
# on two addresses, iqn.2026-11.example:lab1 on 127.0.0.1 and :lab2 on 127.0.0.2.
# With UNMAP=1 the unit can trim; with LOOP=1 it can grow (losetup -c /dev/loop0).
say() { echo "lab: $*"; }
finish() { say "$2"; echo "$1" > /run/rc; dmesg | grep -iE 'I/O error|EXT4-fs error|blocked for' | head -5; [ "$1" = 0 ] || { tail -20 /run/mpathd.log; dmesg | tail -20; }; exit "$1"; }

modprobe -a nbd target_core_mod target_core_file iscsi_target_mod nf_tables nft_reject nft_ct ext4 2>/dev/null || modprobe -a nbd target_core_mod target_core_file iscsi_target_mod
ip link set lo up; ip addr add 127.0.0.2/8 dev lo 2>/dev/null
mount -t configfs none /sys/kernel/config 2>/dev/null
T=/sys/kernel/config/target
truncate -s 512M /run/lio.img
mkdir -p $T/core/fileio_0/disk
BACKING=/run/lio.img
[ -n "${LOOP:-}" ] && modprobe loop && losetup /dev/loop0 /run/lio.img && BACKING=/dev/loop0
echo "fd_dev_name=$BACKING,fd_dev_size=$((512*1024*1024))" > $T/core/fileio_0/disk/control
echo 0123456789abcdef > $T/core/fileio_0/disk/wwn/vpd_unit_serial
echo 1 > $T/core/fileio_0/disk/enable
[ -n "${UNMAP:-}" ] && echo 1 > $T/core/fileio_0/disk/attrib/emulate_tpu
mkdir -p $T/iscsi
for i in 1 2; do
	P=$T/iscsi/iqn.2026-11.example:lab$i/tpgt_1
	mkdir -p "$P/lun/lun_0" "$P/np/127.0.0.$i:3260"
	ln -s $T/core/fileio_0/disk "$P/lun/lun_0/link"
	for kv in authentication=0 demo_mode_write_protect=0 generate_node_acls=1 cache_dynamic_acls=1; do echo "${kv#*=}" > "$P/attrib/${kv%=*}"; done
	echo 1 > "$P/enable"
done

# cut_path N and mend_path N drop all packets of portal N, and let them pass again.
cut_path() {
	nft add table ip "lab$1"; nft add chain ip "lab$1" in '{ type filter hook input priority 0; }'
	nft add rule ip "lab$1" in ip daddr "127.0.0.$1" tcp dport 3260 drop
	nft add rule ip "lab$1" in ip saddr "127.0.0.$1" tcp sport 3260 drop
	say "path $1 cut"
}
mend_path() { nft delete table ip "lab$1"; say "path $1 mended"; }
# until_true COMMAND...: waits at most 20 s for it to succeed.
until_true() { for _ in $(seq 200); do "$@" && return; sleep 0.1; done; return 1; }
