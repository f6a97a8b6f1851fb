#!/usr/bin/env bash
# Installs the Debian packages that the tests run against, if any is missing.
set -euo pipefail
packages="tgt istgt fio qemu-utils qemu-block-extra libnbd-bin libiscsi-bin
gcc systemd libc6-dev nbdkit python3-libnbd nbd-client xfsprogs parted open-iscsi dmsetup qemu-system-x86 busybox-static cpio kmod nftables e2fsprogs iproute2"
packages="$packages liburcu8 libaio1 libdevmapper1.02.1 libedit2 libjson-c5" # for what is unpacked below
missing=
for p in $packages; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
# Programs of these are wanted, not their services: they are unpacked, not installed.
peers=${MPATHD_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/mpathd-peers}
for p in multipath-tools prometheus; do
	[ -e "$peers/$p" ] || missing="$missing $p"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "tests need Debian's$missing: install them as root" >&2
	[ "${CI:-}" = true ] && exit 1
	exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
for p in multipath-tools prometheus; do
	case $missing in *" $p"*) ;; *) continue ;; esac
	missing=${missing/ $p/}
	tmp=$(mktemp -d "${TMPDIR:-/tmp}/peer.XXXXXX")
	(cd "$tmp" && chmod 777 . && apt-get download -qq "$p" >/dev/null && dpkg-deb -x ./*.deb tree)
	mkdir -p "$peers" && mv "$tmp/tree" "$peers/$p" && rm -rf "$tmp"
done
[ -z "$missing" ] && exit 0
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
