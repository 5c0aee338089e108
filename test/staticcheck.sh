#!/bin/bash
# staticcheck over everything, as pinned in the Makefile. Where it can neither be
# found nor fetched it says why, notes a skip as tests do, and gives 0.
set -u
cd "$(dirname "$0")/.."
pinned=$(sed -n 's/^STATICCHECK := //p' Makefile)
dir=${XDG_CACHE_HOME:-$HOME/.cache}/tidemark/tools/${pinned##*@}
if [ ! -x "$dir/staticcheck" ] && ! said=$(GOBIN=$dir timeout 300 "${GO:-go}" install "$pinned" 2>&1); then
	said=$(tail -n 1 <<<"$said")
	echo "staticcheck is left out: $pinned cannot be had: $said"
	[ -z "${TIDEMARK_SKIPS:-}" ] || echo "staticcheck: cannot be had: ${said//$'\n'/ }: test staticcheck" >>"$TIDEMARK_SKIPS"
	exit 0
fi
"$dir/staticcheck" ./... && "$dir/staticcheck" -tags guest,steps ./cmd/tidemark ./test/vm/...
