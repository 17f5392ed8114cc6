#!/bin/sh
# Fetches ONNX Runtime's C++ headers from Debian into PREFIX/include, changing nothing of the system.
# Usage: headers.sh PREFIX
set -eu
package=libonnxruntime-dev suite=trixie # the first suite that has it
prefix=${1:?usage: headers.sh PREFIX}
if [ -e "$prefix/include/onnxruntime/onnxruntime_cxx_api.h" ]; then exit 0; fi

refuse() {
    echo "headers.sh: $1; install $package yourself and set ONNXRUNTIME_ROOT to its prefix" >&2
    exit 4
}

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || refuse "apt-get and dpkg-deb are not here"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -v '^ *#' |
    grep -oE 'https?://[^ ]*/debian/?( |$)' | head -n 1) || true
[ -n "$mirror" ] || refuse "apt's sources name no Debian mirror"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
echo "deb $mirror $suite main" >"$work/sources.list"
apt() {
    (cd "$work" && apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root \
        -o APT::Update::Error-Mode=any "$@" >&2)
}
apt update || refuse "$mirror cannot be read"
apt download "$package" || refuse "$mirror has no $package in $suite"
dpkg-deb -x "$work/$package"_*.deb "$work/root"
mkdir -p "$prefix/include"
cp -r "$work/root/usr/include/onnxruntime" "$prefix/include/"
