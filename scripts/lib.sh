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

# What the lab needs.
# shellcheck disable=SC2034 # used by those that source this
LAB_PACKAGES=(qemu-system-x86:qemu-system-x86_64 busybox-static cpio:cpio xz-utils:xz
    util-linux:setpriv bsdutils:script)

# virtiofsd_package  Prints which package has virtiofsd.
virtiofsd_package() {
    # shellcheck source=/dev/null
    case $(. /etc/os-release && echo "${VERSION_CODENAME:-}") in
    bookworm) echo qemu-system-common ;;
    *) echo virtiofsd ;;
    esac
}

# value_of TEXT  The value at the start of a list with commas, as mayfly reads
# it: two commas stand for one.
value_of() {
    local rest=$1 value=
    while [[ $rest == *,* ]]; do
        value+=${rest%%,*}
        rest=${rest#*,}
        [[ $rest == ,* ]] || { printf '%s' "$value" && return; }
        value+=,
        rest=${rest#,}
    done
    printf '%s' "$value$rest"
}

# newer THAN PATH…  True if THAN is missing, or older than something in PATHs.
newer() {
    local than=$1
    shift
    [ -e "$than" ] || return 0
    [ -n "$(find "$@" -newer "$than" -print -quit)" ]
}

# The first Rust that knows all that is used (Cargo.toml says so too).
RUST_MIN=1.89

rust_is_new_enough() {
    local version
    version=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) && [ -n "$version" ] &&
        [ "$(printf '%s\n' "$RUST_MIN" "$version" | sort -V | head -n 1)" = "$RUST_MIN" ]
}

need_rust() {
    need gcc:cc libc6-dev
    command -v cargo >/dev/null || [ ! -x "$HOME/.cargo/bin/cargo" ] || PATH=$PATH:$HOME/.cargo/bin
    if ! rust_is_new_enough && apt-cache show rustup >/dev/null 2>&1; then
        need rustup
        quietly rustup default stable || die "rustup could not install Rust"
    fi
    if ! rust_is_new_enough; then
        say "needs Rust $RUST_MIN or newer (Debian's rustup package, or see the Rust project's site)"
        exit 3
    fi
}

# build_guest WHAT…  Builds programs of the guest: static, as it has no libraries.
build_guest() {
    RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
        quietly cargo build --release --locked -p mayfly-guest "$@" \
        --target x86_64-unknown-linux-gnu --target-dir "$GUEST_TARGET" || die "the build failed"
}

# What the binary and the guest's programs are made of.
SOURCES=("$ROOT"/{Cargo.toml,Cargo.lock,build.rs,resources,src,boot,compare,devices,guest,image,process,protocol,sandbox,text})

# The binary and the guest's init, built when their sources changed.
build_mayfly() {
    newer "$MAYFLY" "${SOURCES[@]}" || newer "$GUEST_INIT" "${SOURCES[@]}" || return 0
    need_rust
    [ -e "$MAYFLY" ] || say "building mayfly"
    (
        cd "$ROOT"
        quietly cargo build --release --locked -p mayfly || die "the build failed"
        build_guest --bins
    )
    # cargo leaves alone what came out the same.
    touch "$MAYFLY" "$GUEST_INIT"
}

prepare_mayfly() {
    mkdir -p "$ROOT/target"
    (
        flock 9
        build_mayfly
    ) 9>"$ROOT/target/.build.lock"
}

# The default guest, of Debian's cloud kernel. It is made only when something has changed.
build_default_guest() {
    local kernel=$CACHE/kernels/cloud-6.12
    need busybox-static # the guest has no libraries for another
    quietly "$MAYFLY" guest make cloud-6.12 --kernel "$kernel/vmlinux" --modules "$kernel/modules" ||
        die "could not make the default guest"
    # Older versions had a folder there.
    [ -L "$CACHE/default" ] || quietly "$MAYFLY" guest use cloud-6.12 || die "could not choose the default guest"
}

prepare_default_guest() {
    [ -s "$CACHE/kernels/cloud-6.12/vmlinux" ] || "$ROOT/scripts/kernel" cloud-6.12 >/dev/null || exit
    locked default build_default_guest
}

# The image "demo": Debian's busybox and what a root file system has. Made when
# it is missing in this user's store, or older than the binary.
build_demo_image() {
    local work root name
    ! newer "$CACHE/demo-image" "$MAYFLY" && "$MAYFLY" image inspect demo >/dev/null 2>&1 && return 0
    need busybox-static squashfs-tools:sqfstar # the guest has no libraries for another busybox
    work=$(scratch)
    root=$work/root
    mkdir -p "$root"/{bin,dev,etc,home,proc,root,run,sys,tmp,usr/bin,var/tmp}
    chmod 755 "$root"/{,bin,dev,etc,home,proc,run,sys,usr,usr/bin,var}
    chmod 700 "$root/root"
    chmod 1777 "$root"/{,var/}tmp
    install -m 755 "$(command -v busybox)" "$root/bin/busybox"
    for name in $("$root/bin/busybox" --list); do
        [ -e "$root/bin/$name" ] || ln -s busybox "$root/bin/$name"
    done
    printf '%s\n' root:x:0:0:root:/root:/bin/sh nobody:x:65534:65534:nobody:/nonexistent:/bin/false >"$root/etc/passwd"
    printf '%s\n' root:x:0: nobody:x:65534: >"$root/etc/group"
    chmod 644 "$root"/etc/*
    tar --format=posix --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner \
        --pax-option=delete=atime,delete=ctime -C "$root" -cf "$work/root.tar" .
    "$MAYFLY" image import "$work/root.tar" demo --cmd '["sh"]' \
        --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin >/dev/null ||
        die "could not make the image demo"
    rm -rf "$work"
    touch "$CACHE/demo-image"
}

prepare_demo_image() {
    locked demo-image build_demo_image
}
