#!/bin/bash
# Every test: packages that use real disks one at a time, the others together.
# What was skipped is counted and listed; what tests left behind fails the run.
set -u
cd "$(dirname "$0")/.."
export PATH=$PATH:/sbin:/usr/sbin
export TIDEMARK_SKIPS=$(mktemp) TIDEMARK_RAN=$(mktemp) # RAN: what passed in the virtual machine
trap 'rm -f "$TIDEMARK_SKIPS" "$TIDEMARK_RAN"' EXIT
status=0

# left lists what tests make in the kernel: it must be the same after them.
left() {
	losetup --list --noheadings --output NAME,BACK-FILE 2>/dev/null | grep -E '/(tidemark-test-|tidemark-demo-|Test)' | sed 's/^/loop device /'
	for pin in /sys/fs/bpf/tidemark/*/*; do [ -e "$pin" ] && echo "tap $pin"; done
	awk '$2 ~ /\/(tidemark-test-|tidemark-demo-|Test)/ || $1 ~ /tidemark/ {print "mount " $1 " on " $2}' /proc/mounts
	[ ! -e /dev/mapper/control ] || dmsetup ls 2>/dev/null | grep -v '^No devices' | sed 's/^/mapping /'
	grep -ls qemu-system-x86 /proc/[0-9]*/comm | sed 's/^/process /'
}
before=$(left)

test -z "$(gofmt -l cmd internal bpf test)" || { echo "gofmt: $(gofmt -l cmd internal bpf test)"; status=1; }
go vet ./... && go vet -tags guest ./test/vm/... || status=1
test/generated.sh || status=1

real=$(go list -f '{{if or (len .TestGoFiles) (len .XTestGoFiles)}}{{.ImportPath}} {{join .TestImports ","}},{{join .XTestImports ","}}{{end}}' ./... | grep tidemark/internal/testkit | cut -d' ' -f1)
if [ "${TIDEMARK_VM:-1}" = 0 ]; then
	echo "The virtual machine's tests are left out (TIDEMARK_VM=0); make vm runs them."
	real=$(grep -v '^tidemark/test/vm$' <<<"$real")
fi
plain=$(go list ./... | grep -vxF "${real:-none}" | grep -v "^tidemark/test/vm$")
go test -race -timeout 20m $plain || status=1
[ -z "$real" ] || go test -race -count=1 -timeout 60m -p 1 $real || status=1

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
