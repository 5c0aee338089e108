#!/bin/bash
# kernel.sh SUITE: fetches the newest Debian kernel of a suite (bookworm: 6.1,
# bookworm-backports: 6.12), unpacks it and prints its folder, which then holds
# vmlinuz, release (its version) and lib/modules. Nothing is installed, and no
# root is needed. apt does the download with a configuration of its own, so what
# it gives is checked against the signed index; the checksum kept beside the
# package is checked at each use. A mirror is asked once a day; where it does
# not answer, the last kernel fetched is used, and it is asked again an hour later.
set -eu
suite=$1
export PATH=$PATH:/sbin:/usr/sbin LC_ALL=C
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tidemark/kernels/$suite
mkdir -p "$cache"
say() { echo "kernel.sh: $*" >&2; }

exec 9>"$cache/lock"
flock -w 600 9 || { say "another run has held $cache/lock for 10 minutes"; exit 1; }

# sources writes the mirrors of this machine's own apt, with this suite.
sources() {
	local uris keyring main security
	uris=$(apt-get indextargets --format '$(REPO_URI) $(SIGNED_BY)' 'Created-By: Packages' 2>/dev/null | sort -u)
	main=$(awk '$1 ~ /\/debian\/?$/ {print $1; exit}' <<<"$uris")
	security=$(awk '$1 ~ /\/debian-security\/?$/ {print $1; exit}' <<<"$uris")
	keyring=$(awk '$1 ~ /\/debian\/?$/ && $2 ~ /^\// {print $2; exit}' <<<"$uris")
	: "${main:=http://deb.debian.org/debian}" "${keyring:=/usr/share/keyrings/debian-archive-keyring.gpg}"
	[ -e "$keyring" ] || { say "no $keyring: apt-get install debian-archive-keyring"; return 1; }
	echo "deb [signed-by=$keyring arch=amd64] $main $suite main"
	[ "$suite" != bookworm ] || [ -z "$security" ] || echo "deb [signed-by=$keyring arch=amd64] $security bookworm-security main"
}

# fetch leaves the newest kernel package and its checksum in the cache.
fetch() {
	local apt=$cache/apt image deb
	mkdir -p "$apt"/{lists/partial,archives/partial,new}
	sources >"$apt/sources.list" || return 1
	touch "$apt/status"
	local own=(
		-o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State="$apt" -o Dir::State::Lists="$apt/lists"
		-o Dir::State::Status="$apt/status" -o Dir::Cache="$apt" -o Dir::Cache::Archives="$apt/archives" -o APT::Architecture=amd64
		-o APT::Architectures=amd64 -o APT::Sandbox::User= -o Acquire::Languages=none -o Acquire::Retries=3 -o Acquire::http::Timeout=30
		-o APT::Update::Error-Mode=any -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
	)
	timeout 300 apt-get "${own[@]}" -qq update >&2 || return 1
	image=$(apt-cache "${own[@]}" depends --important linux-image-amd64 | awk '$1 == "Depends:" {print $2; exit}')
	[ -n "$image" ] || { say "$suite has no linux-image-amd64"; return 1; }
	(cd "$apt/new" && rm -f -- *.deb && timeout 600 apt-get "${own[@]}" -qq download "$image" >&2) || return 1
	deb=$(cd "$apt/new" && ls -- *.deb)
	if ! sound "$deb"; then
		mv "$apt/new/$deb" "$cache/$deb"
		(cd "$cache" && sha256sum -- "$deb" >"$deb.new" && mv "$deb.new" "$deb.sha256")
	fi
	echo "$deb" >"$cache/newest.new" && mv "$cache/newest.new" "$cache/newest"
	touch "$cache/asked"
}

sound() { (cd "$cache" && sha256sum --status --check "$1.sha256") 2>/dev/null; }

# unpack makes the kernel's folder, or nothing.
unpack() {
	local deb=$1 to=$2
	rm -rf "$to" "$to.new"
	dpkg -x "$cache/$deb" "$to.new"
	[ -e "$to.new/lib/modules" ] || ln -s usr/lib "$to.new/lib"
	mv "$to.new"/boot/vmlinuz-* "$to.new/vmlinuz"
	ls "$to.new/lib/modules" >"$to.new/release"
	depmod -b "$to.new" "$(cat "$to.new/release")"
	mv "$to.new" "$to"
}

recent() { [ -n "$(find "$cache/$1" -mmin "-$2" 2>/dev/null)" ]; }

if ! sound "$(cat "$cache/newest" 2>/dev/null)"; then
	fetch || { say "no sound kernel of $suite is in $cache, and the mirror gives none: connect to a mirror of Debian once"; exit 1; }
elif ! recent asked 1440 && ! recent failed 60; then
	fetch || { touch "$cache/failed"; say "the mirror gives no kernel of $suite now; the last one fetched is used"; }
fi
deb=$(cat "$cache/newest")
dir=$cache/${deb%.deb}
[ -e "$dir/release" ] || unpack "$deb" "$dir"
find "$cache" -mindepth 1 -maxdepth 1 -name 'linux-image-*' ! -name "${deb%.deb}*" -exec rm -rf {} + # older kernels
echo "$dir"
