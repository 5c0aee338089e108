#!/bin/bash
# The whole story on a disk of its own: protect, bookmark, work, ruin, recover.
# Where no disk can be tapped, or with DEMO=served, on an image that is served.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/sbin:/usr/sbin
T=$PWD/bin/tidemark

lacks=()
[ "$(id -u)" = 0 ] || lacks+=("root, as it attaches a disk and loads eBPF programs: sudo make demo")
[ -e /sys/kernel/btf/vmlinux ] || lacks+=("a kernel with type information (CONFIG_DEBUG_INFO_BTF), 6.1 or later")
[ -e /dev/loop-control ] || lacks+=("loop devices (modprobe loop)")
for tool in mkfs.ext4 losetup sqlite3; do command -v $tool >/dev/null || lacks+=("$tool (test/setup.sh installs it where it can)"); done
if [ ${#lacks[@]} -gt 0 ] || [ "${DEMO:-}" = served ]; then
	if [ "${DEMO:-}" != served ]; then
		printf 'A live disk cannot be tapped here. That needs\n'
		printf '  %s\n' "${lacks[@]}"
		printf 'So this is the story of an image that Tidemark serves itself, which needs none of it.\n'
	fi
	exec test/demo-served.sh
fi

# clean ends and removes all that a demo made in its folder, whatever state it is in.
clean() {
	local w=$1 pid loop instance
	pid=$(cat "$w/daemon.pid" 2>/dev/null)
	if [ -n "$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF "$w/state"; then
		TIDEMARK_SOCKET=$w/socket timeout 30 "$T" unprotect --abandon demo
		kill "$pid"
		for _ in $(seq 300); do kill -0 "$pid" || break; sleep 0.1; done
		kill -9 "$pid"
	fi
	instance=$(cat "$w/state/instance" 2>/dev/null)
	[ -n "$instance" ] && rm -r "/sys/fs/bpf/tidemark/$instance"
	for _ in 1 2 3; do awk -v w="$w/" 'index($2, w) == 1 {print $2}' /proc/mounts | tac | xargs -r umount && break; sleep 1; done
	losetup --list --noheadings --output NAME,BACK-FILE | awk -v w="$w/" 'index($2, w) == 1 {print $1}' | while read -r loop; do losetup -d "$loop"; done
	rm -rf --one-file-system "$w"
} 2>/dev/null

# What a demo that was killed left behind goes first.
for left in "${TMPDIR:-/tmp}"/tidemark-demo-*; do
	pid=$(cat "$left/pid" 2>/dev/null) || continue
	tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF demo.sh || { echo "Removing what an earlier demo left in $left."; clean "$left" || true; }
done

W=$(mktemp -d -t tidemark-demo-XXXXXX)
echo $$ >"$W/pid"
export TIDEMARK_SOCKET=$W/socket
loop= work=
finish() {
	code=$?
	trap '' EXIT INT TERM
	set +e
	[ -n "$work" ] && kill "$work" && wait "$work"
	case $code in
	0 | 130 | 143) ;;
	*) echo "The demo failed. The daemon said:"; tail -n 5 "$W/log" ;;
	esac
	clean "$W"
	exit $code
} 2>/dev/null
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; else bold= plain=; fi
now() { date +%s.%N; }
took() { echo "$(now) $1" | awk '{printf "%.1f s", $1-$2}'; }
step() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
accounts() { sqlite3 "$1" 'pragma busy_timeout=5000; pragma integrity_check; select sum(amount), count(*) from account' | tail -n 2 | tr '\n' ' '; }

step "1. A disk with a file system, a database and files with checksums"
truncate -s 512M "$W/image"
loop=$(losetup --show -f "$W/image")
mkfs.ext4 -q "$loop"
mkdir "$W/disk" "$W/past"
mount "$loop" "$W/disk"
mkdir "$W/disk/files"
for i in $(seq 40); do head -c $((RANDOM * 20)) /dev/urandom >"$W/disk/files/$i"; done
(cd "$W/disk/files" && sha256sum -- * >../sums)
sqlite3 "$W/disk/bank.db" 'pragma journal_mode=wal; create table account(id integer primary key, amount int); create table moved(n integer primary key autoincrement, at text);
	with recursive n(i) as (select 1 union all select i+1 from n where i<100) insert into account select i,1000 from n;' >/dev/null
sync
(
	trap 'exit 0' TERM
	while kill -0 $$; do # money moves between accounts; the sum never changes
		sqlite3 "$W/disk/bank.db" "pragma busy_timeout=5000; begin immediate; update account set amount=amount-7 where id=$((RANDOM % 100 + 1)); update account set amount=amount+7 where id=$((RANDOM % 100 + 1)); insert into moved(at) values(datetime()); commit" >/dev/null 2>&1
		sleep 0.02
	done 2>/dev/null
) &
work=$!
echo "$loop is mounted and busy: $(accounts "$W/disk/bank.db")(sum and number of accounts)"

step "2. Protect it, as it is"
setsid "$T" daemon --state "$W/state" 2>"$W/log" & # out of Ctrl-C's reach: it is needed for cleaning up
echo $! >"$W/daemon.pid"
for _ in $(seq 600); do [ -S "$TIDEMARK_SOCKET" ] && break; sleep 0.1; done # a busy disk may take its time
t=$(now)
$T protect --vault "$W/vault" --name demo --wait "$loop"
t_protect=$(took "$t")

step "3. A bookmark, and more work"
t=$(now)
$T bookmark demo before-upgrade
t_bookmark=$(took "$t")
sleep 2
head -c 5000000 /dev/urandom >"$W/disk/files/later"
(cd "$W/disk/files" && sha256sum -- * >../sums.later)
sync -f "$W/disk"
sleep 1
moment=$(date -u +%Y-%m-%dT%H:%M:%S.%NZ)
moved=$(sqlite3 "$W/disk/bank.db" 'pragma busy_timeout=5000; select count(*) from moved' | tail -n 1)
sleep 2

step "4. The disaster: every file is encrypted, the superblock overwritten"
kill "$work"; wait "$work" || true; work=
for f in "$W"/disk/files/* "$W/disk/bank.db"; do openssl enc -aes-256-ctr -pbkdf2 -pass pass:x -in "$f" -out "$f.locked" 2>/dev/null || tr 'a-z\000-\100' 'n-za-m\100-\000' <"$f" >"$f.locked"; rm -f "$f"; done
sync -f "$W/disk"
umount "$W/disk"
dd if=/dev/urandom of="$loop" bs=64k count=16 conv=fsync status=none
mount "$loop" "$W/disk" 2>/dev/null && { echo "the disaster was none"; exit 1; }
echo "$loop can no longer be mounted."
for _ in $(seq 50); do
	$T status demo --json | tr ',' '\n' | awk -F: '/captured_position/{c=$2} /durable_position/{d=$2} END{exit c!=d}' && break
	sleep 0.1
done
captured=$($T status demo --json | tr ',' '\n' | awk -F: '/"captured_position"/{print $2}')
lost=$($T status demo --json | tr ',' '\n' | awk -F: '/"lost_writes"/{print $2}')

step "5. What can be recovered"
$T points --vault "$W/vault" demo

step "6. Mount the disk as it was at the bookmark"
t=$(now)
$T mount --vault "$W/vault" demo --at before-upgrade "$W/past"
t_mount=$(took "$t")
(cd "$W/past/files" && sha256sum --quiet -c ../sums) && echo "All $(wc -l <"$W/past/sums") checksums are right."
cp "$W/past/bank.db"* "$W/" && echo "The database: $(accounts "$W/bank.db")"
[ "$(accounts "$W/bank.db")" = "ok 100000|100 " ] || { echo "the database is not whole"; exit 1; }
umount "$W/past"

step "7. Restore the disk as it was seconds before the disaster, at $moment"
t=$(now)
$T restore --vault "$W/vault" demo --at "$moment" --to "$W/restored"
t_restore=$(took "$t")
mount -o loop "$W/restored" "$W/past"
(cd "$W/past/files" && sha256sum --quiet -c ../sums.later) && echo "All $(wc -l <"$W/past/sums.later") checksums are right."
[ "$(accounts "$W/past/bank.db")" = "ok 100000|100 " ] || { echo "the database is not whole"; exit 1; }
kept=$(sqlite3 "$W/past/bank.db" 'select count(*) from moved')
umount "$W/past"
$T verify --vault "$W/vault" demo
$T unprotect demo

step "In short"
cat <<EOT
  writes and marks captured     $captured
  writes lost                   $lost
  protect, first copy included  $t_protect
  bookmark                      $t_bookmark, no pause
  mount a point                 $t_mount
  restore and read back 512 MiB $t_restore
  transactions in the database  $kept (of $moved committed a moment after that point)

With a disk of yours:
  tidemark daemon &
  tidemark protect --vault /backup/vault --wait /dev/sdX
  tidemark bookmark sdX before-upgrade
  tidemark points  --vault /backup/vault
  tidemark mount   --vault /backup/vault sdX --at before-upgrade /mnt
  tidemark restore --vault /backup/vault sdX --at latest --to /dev/sdY
EOT
