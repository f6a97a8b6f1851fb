#!/usr/bin/env bash
# Installs the Debian packages that the tests run against, if any is missing.
set -euo pipefail
packages="tgt fio qemu-utils qemu-block-extra libnbd-bin libiscsi-bin
gcc libc6-dev qemu-system-x86 busybox-static cpio kmod nftables e2fsprogs iproute2"
missing=
for p in $packages; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "tests need Debian's$missing: install them as root" >&2
	[ "${CI:-}" = true ] && exit 1
	exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
