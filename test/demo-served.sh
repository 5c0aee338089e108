#!/bin/bash
# The whole story without root, eBPF or any tool beyond tar and sha256sum: an
# image that Tidemark serves over NBD, the capture filter in its stack.
set -euo pipefail
cd "$(dirname "$0")/.."
T=$PWD/bin/tidemark

W=$(mktemp -d -t tidemark-demo-served-XXXXXX)
export TIDEMARK_SOCKET=$W/socket
daemon= work=
# memory is where the daemon keeps its ring, which outlives it: the name that internal/serve gives it.
memory=/dev/shm/tidemark-$(printf %s "$W/state" | sha256sum | cut -c1-16)
finish() {
	code=$?
	trap '' EXIT INT TERM
	set +e
	[ -n "$work" ] && kill "$work" && wait "$work"
	[ -n "$daemon" ] && kill -9 "$daemon" && wait "$daemon"
	case $code in
	0 | 130 | 143) ;;
	*) echo "The demo failed. The daemon said:"; tail -n 5 "$W/log" ;;
	esac
	rm -rf "$W" "$memory"
	exit $code
} 2>/dev/null
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; else bold= plain=; fi
now() { date +%s.%N; }
took() { echo "$(now) $1" | awk '{printf "%.1f s", $1-$2}'; }
step() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
start() {
	"$T" daemon --state "$W/state" 2>>"$W/log" &
	daemon=$!
	for _ in $(seq 600); do "$T" device ls >/dev/null 2>&1 && return; sleep 0.1; done
	return 1
}
# archive writes the folder of files, as a tar archive of whole blocks, to the device.
archive() { tar -C "$W/files" -b 8 -cf - . | "$T" device write disk; }
# files checks the files in an image against their checksums.
files() {
	rm -rf "$W/past" && mkdir "$W/past"
	tar -C "$W/past" -xf "$1" 2>/dev/null
	(cd "$W/past" && sha256sum --quiet -c "$2") && echo "All $(wc -l <"$2") checksums are right."
}
# number is the newest that the counter wrote: a decimal in a block of its own, at 48M.
number() { dd if="$1" bs=4096 skip=12288 count=1 status=none | awk '{print $1}'; }

step "1. An image, served over NBD by this user, with files and their checksums"
truncate -s 64M "$W/image"
start
node=$("$T" device create --backing "$W/image" --front nbd-server --name disk)
echo "$node"
mkdir "$W/files"
for i in $(seq 40); do head -c $((RANDOM * 20)) /dev/urandom >"$W/files/$i"; done
(cd "$W/files" && sha256sum -- *) >"$W/sums"
archive

step "2. Protect it: a filter in its stack captures every write, with back-pressure"
t=$(now)
"$T" protect --vault "$W/vault" --name demo --back-pressure --wait disk
t_protect=$(took "$t")
"$T" device filters disk
( # a client that counts, all the while
	trap 'exit 0' TERM
	n=0
	while kill -0 $$; do
		n=$((n + 1))
		printf '%-4095d\n' $n | "$T" device write disk --offset 48M && echo $n >"$W/written.new" && mv "$W/written.new" "$W/written"
	done 2>/dev/null
) &
work=$!

step "3. A bookmark, more work, and the daemon killed in the middle of it"
"$T" bookmark demo before-upgrade
head -c 5000000 /dev/urandom >"$W/files/later"
(cd "$W/files" && sha256sum -- *) >"$W/sums.later"
archive
kill -9 "$daemon"
wait "$daemon" 2>/dev/null || true
start
echo "The next daemon is process $daemon; the capture goes on."
sleep 1
for _ in $(seq 300); do # what was on its way is copied once more
	"$T" status demo --json | grep -q '"state": *"protected"' && break
	sleep 0.1
done
written=$(cat "$W/written")
"$T" bookmark demo after-work

step "4. The disaster: everything is overwritten"
kill "$work"; wait "$work" || true; work=
head -c $((56 << 20)) /dev/urandom | "$T" device write disk
tar -tf "$W/image" >/dev/null 2>&1 && { echo "the disaster was none"; exit 1; }
echo "The image holds no archive any more."
for _ in $(seq 300); do
	"$T" status demo --json | tr ',' '\n' | awk -F: '/captured_position/{c=$2} /durable_position/{d=$2} END{exit c!=d}' && break
	sleep 0.1
done
captured=$("$T" status demo --json | tr ',' '\n' | awk -F: '/"captured_position"/{print $2}')
lost=$("$T" status demo --json | tr ',' '\n' | awk -F: '/"lost_writes"/{print $2}')

step "5. What can be recovered"
"$T" points --vault "$W/vault" demo

step "6. The image as it was at the bookmark, and as it was before the disaster"
t=$(now)
"$T" restore --vault "$W/vault" demo --at before-upgrade --to "$W/restored"
t_restore=$(took "$t")
files "$W/restored" "$W/sums"
"$T" restore --vault "$W/vault" demo --at after-work --to "$W/restored.later"
files "$W/restored.later" "$W/sums.later"
found=$(number "$W/restored.later")
[ "$found" -ge "$written" ] || { echo "the counter is at $found, and $written was written before the bookmark"; exit 1; }

step "7. The vault against the image itself"
"$T" verify --vault "$W/vault" demo --live
"$T" unprotect demo
"$T" device rm disk

step "In short"
cat <<EOT
  writes and marks captured     $captured
  writes lost                   $lost
  protect, first copy included  $t_protect
  restore and read back 64 MiB  $t_restore
  counted by a client           $found at the bookmark, of at least $written written before it

With an image of yours, as any user:
  tidemark daemon --state ~/.tidemark --socket ~/.tidemark/socket &
  export TIDEMARK_SOCKET=~/.tidemark/socket
  tidemark device create --backing disk.img --front nbd-server --name disk    # prints where NBD clients connect
  tidemark protect --vault ~/vault --wait disk
With root and a kernel with BTF the demo is of a live disk, tapped with eBPF.
EOT
