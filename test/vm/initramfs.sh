#!/bin/bash
# initramfs.sh KERNEL-FOLDER FILE: writes the initramfs of the test guest: a
# static busybox and the modules with which it reaches the host's root over 9p.
set -eu
export PATH=$PATH:/sbin:/usr/sbin LC_ALL=C
kernel=$1 out=$2
release=$(cat "$kernel/release")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir -p "$dir"/{bin,modules,proc,sys,dev,host,rw,new}
busybox=$(command -v busybox) || { echo "busybox is missing: apt-get install busybox-static" >&2; exit 1; }
if readelf -l "$busybox" 2>/dev/null | grep -q INTERP; then
	echo "$busybox is not static: apt-get install busybox-static" >&2
	exit 1
fi
cp "$busybox" "$dir/bin/busybox"
cp "$(dirname "$0")/guest-init.sh" "$dir/init"
chmod +x "$dir/init"
n=100
for module in virtio_pci 9pnet_virtio 9p overlay; do
	while read -r what path _; do
		[ "$what" = insmod ] || continue # built in
		name=$(basename "$path") && name=${name%%.ko*}
		[ -e "$dir/modules/seen-$name" ] && continue
		case $path in
		*.xz) xz -dc "$path" ;;
		*.zst) zstd -dc "$path" ;;
		*) cat "$path" ;;
		esac >"$dir/modules/$((n++))-$name.ko"
		touch "$dir/modules/seen-$name"
	done < <(modprobe --show-depends -d "$kernel" -S "$release" "$module")
done
rm "$dir"/modules/seen-*
(cd "$dir" && find . | busybox cpio -o -H newc 2>/dev/null) | gzip -1 >"$out"
