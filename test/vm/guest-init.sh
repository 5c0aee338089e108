#!/bin/busybox sh
# /init of the test guest: the host's root over 9p, read-only, under a tmpfs;
# /results is the folder shared with the host; then the script found there.
b=/bin/busybox
die() {
	$b echo "guest: $*" >/dev/kmsg
	$b echo o >/proc/sysrq-trigger
	$b sleep 60
}
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for m in /modules/*.ko; do $b insmod "$m" || die "insmod $m failed"; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro root /host || die "no root over 9p"
$b mount -t tmpfs -o size=75% rw /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /new || die "no overlay"
$b mkdir -p /new/results /new/lib/modules
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=none results /new/results || die "no results folder"
for d in proc sys dev; do $b mount --move /$d /new/$d; done
exec $b switch_root /new /bin/bash /results/run.sh
