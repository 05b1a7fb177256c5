//! TCP over TAP, in a network namespace of the test's own, with real peers.

use std::process::{Child, Command, Stdio};

use crate::common::{Guest, Running, tool};

const TAP: &str = "tap0";
const GIB: u64 = 1 << 30;

/// A network namespace with a TAP, gone with this.
struct Namespace(String);

impl Namespace {
    fn new(name: &str) -> Self {
        let namespace = Namespace(format!("mayfly-{name}-{}", std::process::id()));
        tool("ip", &["netns", "add", &namespace.0]);
        for command in [
            "link set lo up",
            "tuntap add dev tap0 mode tap",
            "addr add 10.9.0.1/24 dev tap0",
            "link set tap0 up",
        ] {
            let words: Vec<&str> = command.split(' ').collect();
            tool("ip", &[&["-n", &namespace.0], &words[..]].concat());
        }
        namespace
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).arg(program);
        command
    }

    fn start(&self, mut guest: Guest) -> Running {
        let mut command = self.command(guest.command.get_program());
        command.args(guest.command.get_args()).stdin(Stdio::null());
        command.args(["--net", &format!("tap={TAP}")]).args([
            "--cmdline",
            "ip=10.9.0.2::10.9.0.1:255.255.255.0:guest:eth0:off",
        ]);
        guest.command = command;
        guest.start()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.0])
            .status();
    }
}

/// A process of the host, ended with this.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_gibibyte_goes_in_and_comes_back_unchanged() {
    let namespace = Namespace::new("gib");
    let guest = Guest::new(
        "ping -c 1 -w 60 10.9.0.1 >/dev/null && echo reached
         mkfifo /tmp/sum
         md5sum </tmp/sum >/tmp/sum.txt &
         nc 10.9.0.1 5001 </dev/null | tee /tmp/sum | nc 10.9.0.1 5002
         wait
         echo sum: $(cut -d ' ' -f 1 </tmp/sum.txt)
         echo offloads: $(cat /sys/class/net/eth0/device/features)",
    );
    let folder = tempfile::tempdir().unwrap();
    let (sent, received) = (folder.path().join("sent"), folder.path().join("received"));
    // Not compressible, not repeating, and quick to make.
    let source = format!(
        "openssl enc -aes-128-ctr -pass pass:mayfly -nosalt -pbkdf2 </dev/zero 2>/dev/null | head -c {GIB} |
         tee >(md5sum | cut -d ' ' -f 1 >{}) | busybox nc -l -p 5001",
        sent.display()
    );
    let sink = format!(
        "busybox nc -l -p 5002 </dev/null | tee >(wc -c >{0}.len) | md5sum | cut -d ' ' -f 1 >{0}",
        received.display()
    );
    let start = |script: &str| {
        let mut bash = namespace.command("bash");
        Peer(bash.args(["-c", script]).spawn().unwrap())
    };
    let (mut sink, _source) = (start(&sink), start(&source));
    std::thread::sleep(std::time::Duration::from_millis(500));
    let ended = namespace.start(guest).wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert!(sink.0.wait().unwrap().success());
    let read = |path: &std::path::Path| std::fs::read_to_string(path).unwrap().trim().to_owned();
    let expected = read(&sent);
    assert_eq!(expected.len(), 32);
    assert!(ended.stdout.contains("reached"), "{ended:?}");
    assert!(
        ended.stdout.contains(&format!("sum: {expected}")),
        "{expected}: {ended:?}"
    );
    assert_eq!(read(&received.with_extension("len")), GIB.to_string());
    assert_eq!(read(&received), expected);
}

#[test]
fn iperf3_both_ways() {
    let namespace = Namespace::new("iperf");
    let guest = Guest::with_archives(
        "cloud-6.12",
        "vmlinux",
        "iperf3 -c 10.9.0.1 -t 4 -f m && echo out: done
         iperf3 -c 10.9.0.1 -t 4 -f m -R && echo in: done
         cat /sys/class/net/eth0/address",
        &["iperf3.cpio"],
    );
    let mut server = namespace.command("iperf3");
    let _server = Peer(server.args(["-s"]).stdout(Stdio::null()).spawn().unwrap());
    let ended = namespace.start(guest).wait();
    assert!(ended.stdout.contains("out: done"), "{ended:?}");
    assert!(ended.stdout.contains("in: done"), "{ended:?}");
    assert!(ended.stdout.contains("\n02:"), "{ended:?}");
}

#[test]
fn a_given_mac_is_the_guest_s_and_a_tap_serves_one_vm() {
    let namespace = Namespace::new("mac");
    let mut guest = Guest::new("echo mac: $(cat /sys/class/net/eth0/address); sleep 1000");
    let mut command = namespace.command(guest.command.get_program());
    command
        .args(guest.command.get_args())
        .args(["--net", "tap=tap0,mac=02:11:22:33:44:55"])
        .stdin(Stdio::null());
    guest.command = command;
    let mut running = guest.start();
    running.expect("mac: 02:11:22:33:44:55");
    let ended = namespace.start(Guest::new("")).wait();
    assert_eq!(ended.code(), Some(3), "{ended:?}");
    assert!(
        ended.stderr.contains("--net tap=tap0: another VM uses it"),
        "{ended:?}"
    );
}
