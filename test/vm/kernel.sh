#!/bin/bash
# kernel.sh SUITE: fetches the newest Debian kernel of a suite (bookworm: 6.1,
# bookworm-backports: 6.12, trixie-backports: the newest there is), unpacks it and
# prints its folder, which then holds vmlinuz, release (its version) and
# lib/modules. Nothing is installed, and no root is needed. apt does the download
# with a configuration of its own, so what it gives is checked against the signed
# index; the checksum kept beside each package is checked at each use. A mirror is
# asked once a day; where it does not answer, the last kernel fetched is used, and
# it is asked again an hour later.
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

# depends prints what a package depends on, of the names that match a pattern.
depends() { apt-cache "${own[@]}" depends --important "$1" | awk -v want="$2" '$1 == "Depends:" && $2 ~ want {print $2}'; }

# fetch leaves the packages of the newest kernel and their checksums in the
# cache. Since 7.x it comes in several packages.
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
	image=$(depends linux-image-amd64 '^linux-image-[0-9]' | head -n 1)
	[ -n "$image" ] || { say "$suite has no linux-image-amd64"; return 1; }
	(cd "$apt/new" && rm -f -- *.deb && timeout 600 apt-get "${own[@]}" -qq download "$image" $(depends "$image" '^linux-(base-[0-9]|binary-|modules-)') >&2) || return 1
	for deb in $(cd "$apt/new" && ls -- *.deb); do
		if ! sound "$deb"; then
			mv "$apt/new/$deb" "$cache/$deb"
			(cd "$cache" && sha256sum -- "$deb" >"$deb.new" && mv "$deb.new" "$deb.sha256")
		fi
		echo "$deb"
	done >"$cache/newest.new" && mv "$cache/newest.new" "$cache/newest"
	touch "$cache/asked"
}

# sound says whether a file of the cache is whole, complete whether all of a kernel is.
sound() { (cd "$cache" && sha256sum --status --check "$1.sha256") 2>/dev/null; }
complete() {
	local deb
	grep -q '^linux-image-' "$cache/newest" 2>/dev/null || return 1
	while read -r deb; do sound "$deb" || return 1; done <"$cache/newest"
}

# unpack makes the kernel's folder, or nothing.
unpack() {
	local to=$1 deb
	rm -rf "$to" "$to.new"
	while read -r deb; do dpkg -x "$cache/$deb" "$to.new"; done <"$cache/newest"
	[ -e "$to.new/lib/modules" ] || ln -s usr/lib "$to.new/lib"
	ls "$to.new/lib/modules" >"$to.new/release"
	mv "$to.new"/boot/vmlinuz-* "$to.new/vmlinuz" 2>/dev/null || # it has moved to
		mv "$to.new/lib/modules/$(cat "$to.new/release")/vmlinuz" "$to.new/vmlinuz"
	depmod -b "$to.new" "$(cat "$to.new/release")"
	mv "$to.new" "$to"
}

recent() { [ -n "$(find "$cache/$1" -mmin "-$2" 2>/dev/null)" ]; }

if ! complete; then
	fetch || { say "no sound kernel of $suite is in $cache, and the mirror gives none: connect to a mirror of Debian once"; exit 1; }
elif ! recent asked 1440 && ! recent failed 60; then
	fetch || { touch "$cache/failed"; say "the mirror gives no kernel of $suite now; the last one fetched is used"; }
fi
deb=$(grep '^linux-image-' "$cache/newest")
dir=$cache/${deb%.deb}
[ -e "$dir/release" ] || unpack "$dir"
for old in "$cache"/linux-*; do # older kernels
	name=${old##*/} name=${name%.sha256}
	[ "$old" = "$dir" ] || grep -qxF "$name" "$cache/newest" || rm -rf "$old"
done
echo "$dir"
