#!/bin/bash
# Installs what tests and demo use, where it is missing and this is root.
# Quick, and without a word, where everything is there. Never fails: what needs
# a missing tool is skipped, or fails where TIDEMARK_REQUIRE names it.
export PATH=$PATH:/sbin:/usr/sbin
declare -A want=(
	[mkfs.ext4]=e2fsprogs [mkfs.xfs]=xfsprogs [mkfs.btrfs]=btrfs-progs [fio]=fio [sqlite3]=sqlite3 [qemu-img]=qemu-utils
	[qemu-system-x86_64]=qemu-system-x86 [nbdinfo]=libnbd-bin [nbdkit]=nbdkit [modprobe]=kmod [fusermount3]=fuse3
	[dmsetup]=dmsetup [lvm]=lvm2 [mdadm]=mdadm [losetup]=mount [sfdisk]=fdisk [xz]=xz-utils
)
static_busybox() { ldd "$(command -v busybox || echo /nowhere)" 2>&1 | grep -q 'not a dynamic'; }
missing() {
	for tool in "${!want[@]}"; do command -v "$tool" >/dev/null || echo "${want[$tool]}"; done
	static_busybox || echo busybox-static
	[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || echo debian-archive-keyring # the virtual machine's kernels
}
mapfile -t packages < <(missing)
[ ${#packages[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "Missing, and only installed by root with apt: ${packages[*]}. What needs them is skipped." >&2
	exit 0
fi
echo "Installing ${packages[*]}."
export DEBIAN_FRONTEND=noninteractive
apt=(timeout 900 apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
install() { "${apt[@]}" -y --no-install-recommends install "$@" </dev/null >"$log" 2>&1; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for try in 1 2 3; do
	"${apt[@]}" update >"$log" 2>&1 && install "${packages[@]}" && exit 0
	for package in "${packages[@]}"; do install "$package"; done # one that this release lacks must not keep the others out
	mapfile -t packages < <(missing)
	[ ${#packages[@]} -eq 0 ] && exit 0
	[ $try = 3 ] || sleep $((try * 10))
done
echo "apt could not install: ${packages[*]}. What needs them is skipped. Its last words:" >&2
tail -n 5 "$log" >&2
exit 0
