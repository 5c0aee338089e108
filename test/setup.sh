#!/bin/bash
# Installs what tests and demo use, where it is missing and this is root.
declare -A want=(
	[mkfs.ext4]=e2fsprogs [mkfs.xfs]=xfsprogs [mkfs.btrfs]=btrfs-progs [fio]=fio [sqlite3]=sqlite3 [qemu-img]=qemu-utils
	[qemu-system-x86_64]=qemu-system-x86 [nbdinfo]=libnbd-bin [nbdkit]=nbdkit [busybox]=busybox-static [modprobe]=kmod
	[fusermount3]=fuse3 [dmsetup]=dmsetup [mdadm]=mdadm [losetup]=mount [sfdisk]=fdisk
)
missing=()
for tool in "${!want[@]}"; do
	PATH=$PATH:/sbin:/usr/sbin command -v "$tool" >/dev/null || missing+=("${want[$tool]}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "Not here, and not installed without root and apt: ${missing[*]}. What needs them is skipped." >&2
	exit 0
fi
export DEBIAN_FRONTEND=noninteractive
for try in 1 2 3; do
	apt-get -o DPkg::Lock::Timeout=300 -qq update &&
		apt-get -o DPkg::Lock::Timeout=300 -qq -y --no-install-recommends install "${missing[@]}" >/dev/null && exit 0
	sleep $((try * 5))
done
echo "apt could not install: ${missing[*]}. What needs them is skipped." >&2
exit 0
