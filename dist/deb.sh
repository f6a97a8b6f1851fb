#!/usr/bin/env bash
# Builds mpathd_VERSION_ARCH.deb in the directory named, from the binary named:
#   deb.sh BINARY VERSION OUTDIR
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
binary=$1 version=$2 out=$3
arch=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 0755 "$root"
install -D -m 0755 "$binary" "$root/usr/sbin/mpathd"
install -D -m 0644 "$here/mpathd.service" "$root/lib/systemd/system/mpathd.service"
install -D -m 0644 "$here/60-mpathd.rules" "$root/lib/udev/rules.d/60-mpathd.rules"
install -D -m 0644 "$here/modprobe.conf" "$root/lib/modprobe.d/mpathd.conf"
install -d "$root/usr/share/man/man8" "$root/usr/share/bash-completion/completions" "$root/usr/share/zsh/vendor-completions" "$root/usr/share/fish/vendor_completions.d"
"$binary" manual "$root/usr/share/man/man8"
gzip -9n "$root"/usr/share/man/man8/*
"$binary" completion bash > "$root/usr/share/bash-completion/completions/mpathd"
"$binary" completion zsh > "$root/usr/share/zsh/vendor-completions/_mpathd"
"$binary" completion fish > "$root/usr/share/fish/vendor_completions.d/mpathd.fish"
doc=$root/usr/share/doc/mpathd
install -d "$doc/examples"
install -m 0644 "$here"/../docs/*.md "$doc"
sed 's|](docs/|](|g' "$here"/../README.md > "$doc/README.md" # beside the others here
chmod 0644 "$doc/README.md"
install -m 0644 "$here"/../docs/examples/* "$doc/examples"
install -m 0644 "$here"/prometheus/*.yml "$here"/grafana/*.json "$doc/examples"
install -m 0644 "$here/../LICENSE" "$doc/copyright"
install -D -m 0755 -t "$root/DEBIAN" "$here"/debian/postinst "$here"/debian/prerm "$here"/debian/postrm
cat > "$root/DEBIAN/control" <<CONTROL
Package: mpathd
Version: $version
Architecture: $arch
Maintainer: mpathd developers <mpathd@example.org>
Installed-Size: $(du -sk "$root" | cut -f1)
Section: admin
Priority: optional
Depends: kmod
Recommends: systemd, udev
Description: multipath block devices over iSCSI, in userspace
 mpathd logs in to several iSCSI targets, recognises the same disk behind them
 by its SCSI ID, routes I/O over the healthy paths and shows the result as
 /dev/nbdX and as an NBD export.
CONTROL
mkdir -p "$out"
dpkg-deb --root-owner-group --build "$root" "$out/mpathd_${version}_${arch}.deb"
