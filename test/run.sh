#!/bin/bash
# Every test. Beside the packages, of which those that use real disks come one at a
# time, as they share this kernel's numbers for devices, there are lanes for what has a
# kernel of its own or needs none: the virtual machine's guests, and staticcheck.
# What a lane says comes when it has ended. What was skipped is counted and
# listed; what tests left behind fails the run.
set -u
cd "$(dirname "$0")/.."
export PATH=$PATH:/sbin:/usr/sbin
scratch=$(mktemp -d)
export TIDEMARK_SKIPS=$scratch/skips TIDEMARK_RAN=$scratch/ran # RAN: what passed in the virtual machine
export GORACE="atexit_sleep_ms=20 ${GORACE:-}"                  # a second, by default, for each of thousands of processes
touch "$TIDEMARK_SKIPS" "$TIDEMARK_RAN"
status=0

# lane NAME COMMAND... runs beside all else, in a process group of its own.
declare -A lanes
lane() {
	local name=$1
	shift
	set -m
	"$@" >"$scratch/$name" 2>&1 </dev/null &
	lanes[$name]=$!
	set +m
}
# join waits for a lane, prints what it said and gives its exit code.
join() {
	wait "${lanes[$1]}"
	local code=$?
	unset "lanes[$1]"
	cat "$scratch/$1"
	return $code
}
finish() {
	for pid in "${lanes[@]}"; do kill -- "-$pid" 2>/dev/null; done
	rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# left lists what tests make in the kernel: it must be the same after them.
left() {
	losetup --list --noheadings --output NAME,BACK-FILE 2>/dev/null | grep -E '/(tidemark-test-|tidemark-demo-|Test)' | sed 's/^/loop device /'
	for pin in /sys/fs/bpf/tidemark/*/*; do [ -e "$pin" ] && echo "tap $pin"; done
	awk '$2 ~ /\/(tidemark-test-|tidemark-demo-|Test)/ || $1 ~ /tidemark/ {print "mount " $1 " on " $2}' /proc/mounts
	[ ! -e /dev/mapper/control ] || dmsetup ls 2>/dev/null | grep -v '^No devices' | sed 's/^/mapping /'
	grep -ls qemu-system-x86 /proc/[0-9]*/comm | sed 's/^/process /'
}
before=$(left)

if [ "${TIDEMARK_VM:-1}" = 0 ]; then
	echo "The virtual machine's tests are left out (TIDEMARK_VM=0); make vm runs them."
else
	lane vm go test -count=1 -timeout 60m ./test/vm
fi

test -z "$(gofmt -l client cmd internal bpf test)" || { echo "gofmt: $(gofmt -l client cmd internal bpf test)"; status=1; }
go vet ./... && go vet -tags guest,steps ./cmd/tidemark ./test/vm/... || status=1
test/generated.sh || status=1
lane staticcheck test/staticcheck.sh

all=$(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}} {{join .TestImports ","}},{{join .XTestImports ","}}{{end}}' ./... | grep -v '^tidemark/test/vm ')
real=$(grep tidemark/internal/testkit <<<"$all" | cut -d' ' -f1)
plain=$(grep -v tidemark/internal/testkit <<<"$all" | cut -d' ' -f1)
go test -race -timeout 20m $plain || status=1
go test -race -count=1 -timeout 60m -p 1 $real || status=1
join staticcheck || status=1
[ -z "${lanes[vm]:-}" ] || join vm || status=1

after=$(left)
new=$(comm -13 <(sort <<<"$before") <(sort <<<"$after"))
if [ -n "$new" ]; then
	echo "The tests left something behind:"
	echo "$new"
	status=1
fi
echo
echo "Skipped here: $(sort -u "$TIDEMARK_SKIPS" | grep -c .)"
# A line ends in "FOLDER TEST"; of those that passed in a guest it says so.
sort -u "$TIDEMARK_SKIPS" | awk -v ran="$TIDEMARK_RAN" '
	BEGIN { while ((getline line < ran) > 0) { split(line, f, " "); at[f[2] " " f[3]] = at[f[2] " " f[3]] " " f[1] } }
	{ what = $(NF - 1) " " $NF; print "  " $0 (what in at ? "; passed in the virtual machine:" at[what] : "") }'
# Where features are required nothing else may be skipped either, but for what
# TIDEMARK_ABSENT names: things this kind of machine cannot have.
if [ -n "${TIDEMARK_REQUIRE:-}" ]; then
	absent=$(echo "${TIDEMARK_ABSENT:-none}" | tr ', ' '||')
	if grep -vE "^($absent): " "$TIDEMARK_SKIPS"; then
		echo "^ skipped, and on this machine nothing may be."
		status=1
	fi
fi
exit $status
