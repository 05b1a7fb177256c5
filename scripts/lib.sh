# Shared by the scripts in this folder: source it, don't run it.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
CACHE=${MAYFLY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mayfly}
MAYFLY=$ROOT/target/release/mayfly
GUEST_TARGET=$ROOT/target/guest
GUEST_INIT=$GUEST_TARGET/x86_64-unknown-linux-gnu/release/mayfly-init

# A plain user's PATH lacks the folders that hold depmod and mkfs.
PATH=$PATH:/usr/sbin:/sbin

say() { printf 'mayfly: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        say "needs root for: $*"
        return 1
    fi
}

# Runs a command silently; shows what it printed only when it fails.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    [ "$status" = 0 ] || cat "$log" >&2
    rm -f "$log"
    return "$status"
}

# need PACKAGE[:COMMAND]…  Installs Debian packages that are missing. With a
# COMMAND, any program of that name on the PATH will do.
need() {
    local want package command missing=()
    for want in "$@"; do
        package=${want%%:*}
        command=${want#*:}
        if [ "$command" != "$want" ]; then
            command -v "$command" >/dev/null || missing+=("$package")
        elif ! dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed'; then
            missing+=("$package")
        fi
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if ! command -v apt-get >/dev/null; then
        say "please install (names as on Debian): ${missing[*]}"
        exit 3
    fi
    say "installing ${missing[*]}"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq
        --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}")
    # A fresh machine has no package lists, or stale ones: update only then.
    as_root "${install[@]}" >/dev/null 2>&1 </dev/null && return 0
    quietly as_root apt-get update -qq && quietly as_root "${install[@]}" && return 0
    say "could not install ${missing[*]}; install them and try again"
    exit 3
}

# locked NAME COMMAND…  Runs COMMAND while no other run does so under NAME.
locked() {
    local name=$1
    shift
    mkdir -p "$CACHE/locks"
    (
        flock 9
        "$@"
    ) 9>"$CACHE/locks/$name"
}

# publish BUILT FINAL  Puts a finished folder or file in place by rename, so
# that nobody ever sees half of it. Call it under a lock.
publish() {
    mkdir -p "$(dirname "$2")"
    if [ -d "$2" ] && [ ! -L "$2" ]; then
        rm -rf "$2.old"
        mv -T "$2" "$2.old"
    fi
    mv -T "$1" "$2"
    rm -rf "$2.old"
}

# scratch  Prints a new folder on the cache's file system, where a rename is
# atomic. The caller removes or publishes it.
scratch() {
    mkdir -p "$CACHE/tmp"
    mktemp -d "$CACHE/tmp/XXXXXX"
}
