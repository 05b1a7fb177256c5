//! A mayfly of the Debian package, on a Debian that has nothing else of it: no clone, no
//! kernel, no images. It makes the guest that VMs boot by default from the host's own kernel.

use std::process::Command;

use mayfly_testing::tools::run;
use mayfly_testing::{kernel, test_data};

/// Runs `$4` in the root `$1`, with a kernel `$2` and its modules `$3` as the host's own.
/// What is written goes to memory; nothing of the host's other files is there.
const INSIDE: &str = r#"
    memory=$(mktemp -d)
    mount -t tmpfs tmpfs "$memory"
    mkdir "$memory"/{upper,work,root}
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$memory/upper,workdir=$memory/work" "$memory/root"
    cd "$memory/root"
    release=$(uname -r)
    mkdir -p boot "lib/modules/$release" old
    touch "boot/vmlinuz-$release"
    mount --bind "$2" "boot/vmlinuz-$release"
    mount --bind "$3" "lib/modules/$release"
    for name in proc sys dev; do mount --rbind "/$name" "$name"; done
    for name in run tmp; do mount -t tmpfs tmpfs "$name"; done
    pivot_root . old
    umount -l /old
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root sh -euc "$4"
"#;

#[test]
fn the_package_runs_images_and_boots_kernels() {
    let script = "
        ! command -v cargo
        mkdir -p /image/bin
        cp /bin/busybox /image/bin/sh
        mayfly image import /image box
        mayfly run --rm box sh -c 'echo hello from an image; exit 0'
        mayfly run --rm --net none box sh -c 'echo hello again'
        mayfly boot --cmdline '-- run echo hello from a kernel' </dev/null
        mayfly guest ls";
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-euc", INSIDE, "-"]);
    command.arg(test_data("installed"));
    command.args(["vmlinuz", "modules"].map(|file| kernel("generic-6.12", file)));
    let said = run(command.arg(script));
    let mut lines = said.lines();
    for hello in ["from an image", "again", "from a kernel"] {
        let hello = format!("hello {hello}");
        assert!(
            lines.any(|line| line.trim_end() == hello),
            "{hello}: {said}"
        );
    }
}
