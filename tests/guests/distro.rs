//! A distribution, as its users know it: systemd, DHCP, apt, a reboot.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use mayfly_testing::distro;
use mayfly_testing::guest::{Controlled, Guest, Running};
use mayfly_testing::net::Namespace;
use mayfly_testing::tools::{Peer, tool};

/// Where apt in the guest looks for packages.
const MIRROR: &str = "10.9.0.1:8000";
/// What only DHCP can have told the guest.
const ADDRESS: &str = "10.9.0.77";

/// Boots from the disk, and logs in.
fn boot(namespace: &Namespace, disk: &Path, root: &str) -> Controlled {
    let guest = Guest::plain()
        .args(["--memory", "512M", "--json", "--net", "tap=tap0"])
        .args(["--disk", &format!("path={}", disk.display())])
        .args(["--cmdline", &format!("root={root}")]);
    let mut vm = Controlled::start(guest, |guest| {
        let mut guest = namespace.enter(guest);
        guest.command.stdin(Stdio::piped());
        guest.start()
    });
    vm.running.expect("distro login: ");
    enter(&mut vm.running, "root");
    vm
}

/// Types a line. It is echoed: what to expect must not be in it.
fn enter(running: &mut Running, line: &str) {
    let input = running.child.stdin.as_mut().unwrap();
    input.write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn dhcp_server(namespace: &Namespace, folder: &Path) -> Peer {
    let (config, leases) = (folder.join("udhcpd.conf"), folder.join("leases"));
    fs::write(&leases, "").unwrap();
    let text = format!(
        "interface tap0\nstart {ADDRESS}\nend {ADDRESS}\noption subnet 255.255.255.0\n\
         option router 10.9.0.1\nlease_file {}\npidfile {}\n",
        leases.display(),
        folder.join("pid").display()
    );
    fs::write(&config, text).unwrap();
    let mut server = namespace.command("busybox");
    server.args(["udhcpd", "-f"]).arg(config);
    Peer(server.stderr(Stdio::null()).spawn().unwrap())
}

#[test]
fn debian_runs_installs_reboots_and_turns_off() {
    let namespace = Namespace::new("distro");
    let folder = tempfile::tempdir().unwrap();
    let (image, disk) = (distro("rootfs.img"), folder.path().join("disk"));
    let paths = [&image, &disk].map(|path| path.to_str().unwrap());
    tool("cp", &["--sparse=always", paths[0], paths[1]]);
    let _dhcp = dhcp_server(&namespace, folder.path());
    let mut mirror = namespace.command("busybox");
    mirror.args(["httpd", "-f", "-p", MIRROR, "-h"]);
    let _mirror = Peer(mirror.arg(distro("repository")).spawn().unwrap());

    let mut vm = boot(&namespace, &disk, "/dev/vda").running;
    enter(
        &mut vm,
        "echo state: $(systemctl is-system-running --wait), \
         failed: $(systemctl --failed --quiet --no-legend | wc -l)",
    );
    vm.expect("state: running, failed: 0");
    enter(
        &mut vm,
        "/lib/systemd/systemd-networkd-wait-online; ip -4 -o addr show scope global",
    );
    vm.expect(&format!("inet {ADDRESS}/24"));
    enter(
        &mut vm,
        "apt-get -q update && apt-get -q install mayfly-greeting && mayfly-greeting",
    );
    vm.expect("greetings, installed");
    enter(&mut vm, "systemctl reboot");
    let ended = vm.wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "reset");

    let mut vm = boot(&namespace, &disk, "LABEL=distro");
    enter(
        &mut vm.running,
        "systemctl is-system-running --wait && mayfly-greeting",
    );
    vm.running.expect("greetings, installed");
    vm.ctl(&["shutdown", "--deadline", "300"]);
    let ended = vm.running.wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "power-off");
}
