#!/bin/bash
# Every test: packages that use real disks one at a time, the others together.
# What was skipped is counted and listed; what tests left behind fails the run.
set -u
cd "$(dirname "$0")/.."
export PATH=$PATH:/sbin:/usr/sbin
export TIDEMARK_SKIPS=$(mktemp)
trap 'rm -f "$TIDEMARK_SKIPS"' EXIT
status=0
left() { losetup -a 2>/dev/null | grep -c tidemark-test-; ls -d /sys/fs/bpf/tidemark/*/* 2>/dev/null; grep -c tidemark-test /proc/mounts; }
before=$(left)

test -z "$(gofmt -l cmd internal bpf)" || { echo "gofmt: $(gofmt -l cmd internal bpf)"; status=1; }
go vet ./... || status=1
test/generated.sh || status=1

real=$(go list -f '{{if or (len .TestGoFiles) (len .XTestGoFiles)}}{{.ImportPath}} {{join .TestImports ","}},{{join .XTestImports ","}}{{end}}' ./... | grep tidemark/internal/testkit | cut -d' ' -f1)
plain=$(go list ./... | grep -vxF "${real:-none}")
go test -race -timeout 15m $plain || status=1
[ -z "$real" ] || go test -race -timeout 30m -p 1 $real || status=1

after=$(left)
if [ "$before" != "$after" ]; then
	echo "The tests left something behind (loop devices, pins, mounts): before: $before; after: $after"
	status=1
fi
echo
echo "Skipped: $(sort -u "$TIDEMARK_SKIPS" | grep -c .)"
sort -u "$TIDEMARK_SKIPS" | sed 's/^/  /'
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
