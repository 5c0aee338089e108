#!/bin/bash
# Says in a sentence what must be there before anything can be built.
fail() { echo "tidemark: $*" >&2; exit 1; }
command -v git >/dev/null || fail "git is missing: apt-get install git"
command -v gcc >/dev/null || fail "gcc is missing (the race detector needs it): apt-get install gcc"
echo '#include <stdlib.h>' | gcc -E - >/dev/null 2>&1 || fail "the C library's headers are missing (the race detector needs them): apt-get install libc6-dev"
command -v go >/dev/null || fail "Go is missing: install Go 1.26 or later from https://go.dev/dl"
v=$(go env GOVERSION); v=${v#go}; minor=${v#*.}; minor=${minor%%.*}
[ "${v%%.*}" -gt 1 ] || [ "${minor%%[!0-9]*}" -ge 26 ] || fail "Go $v is too old: install Go 1.26 or later from https://go.dev/dl"
