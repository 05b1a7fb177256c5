//! TCP over TAP, in a network namespace of the test's own, with real peers.

use std::process::Stdio;

use mayfly_testing::guest::Guest;
use mayfly_testing::net::Namespace;
use mayfly_testing::tools::{Peer, random_file, tool};

const GIB: u64 = 1 << 30;

#[test]
fn a_gibibyte_goes_in_and_comes_back_unchanged() {
    let namespace = Namespace::new("gib");
    let guest = Guest::new(
        "ping -c 1 -w 60 10.9.0.1 >/dev/null && echo reached
         nc 10.9.0.1 5001 -e dd of=/tmp/data bs=256k iflag=fullblock 2>/dev/null
         echo sum: $(md5sum /tmp/data | cut -d ' ' -f 1)
         nc 10.9.0.1 5002 -e dd if=/tmp/data bs=256k 2>/dev/null
         echo sent: back",
    )
    .args(["--memory", "3G"]);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (sent, received) = (path("sent"), path("received"));
    // Not compressible, not repeating, and quick to make.
    let make = format!(
        "openssl enc -aes-128-ctr -pass pass:mayfly -nosalt -pbkdf2 </dev/zero 2>/dev/null |
         head -c {GIB} >{sent}"
    );
    tool("sh", &["-c", &make]);
    let serve = |port: &str, file: &str| {
        let mut nc = namespace.command("busybox");
        nc.args([
            "nc",
            "-l",
            "-p",
            port,
            "-e",
            "dd",
            "bs=256k",
            "iflag=fullblock",
            file,
        ]);
        Peer(nc.stderr(Stdio::null()).spawn().unwrap())
    };
    let _source = serve("5001", &format!("if={sent}"));
    let mut sink = serve("5002", &format!("of={received}"));
    let ended = namespace.start(guest).wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert!(ended.stdout.contains("reached"), "{ended:?}");
    let expected = tool("md5sum", &[&sent]);
    let expected = expected.split(' ').next().unwrap();
    assert!(
        ended.stdout.contains(&format!("sum: {expected}")),
        "{expected}: {ended:?}"
    );
    assert!(sink.0.wait().unwrap().success());
    assert_eq!(std::fs::metadata(&received).unwrap().len(), GIB);
    tool("cmp", &[&sent, &received]);
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
    let guest = Guest::new("echo mac: $(cat /sys/class/net/eth0/address); sleep 1000")
        .args(["--net", "tap=tap0,mac=02:11:22:33:44:55"]);
    let mut running = namespace.enter(guest).start();
    running.expect("mac: 02:11:22:33:44:55");
    let ended = namespace.start(Guest::new("")).wait();
    assert_eq!(ended.code(), Some(3), "{ended:?}");
    assert!(
        ended.stderr.contains("--net tap=tap0: another VM uses it"),
        "{ended:?}"
    );
}

/// What each of two CPUs sends and receives goes by a pair of queues of its own.
#[test]
fn two_cpus_use_two_queues() {
    let namespace = Namespace::with("queues", "tap multi_queue", ",queues=cpus");
    let guest = Guest::new(
        "queues() { ls -d $1 | wc -l; }
         echo net: $(queues '/sys/class/net/eth0/queues/rx-*') disk: $(queues '/sys/block/vda/mq/*')
         for cpu in 1 2; do
             (taskset $cpu nc 10.9.0.1 500$cpu -e dd of=/tmp/$cpu bs=64k iflag=fullblock 2>/dev/null
              taskset $cpu nc 10.9.0.1 501$cpu -e dd if=/tmp/$cpu bs=64k 2>/dev/null
              taskset $cpu dd if=/tmp/$cpu of=/dev/vda bs=1M seek=$((cpu * 16 - 16)) conv=fsync 2>/dev/null
              echo 3 > /proc/sys/vm/drop_caches
              echo sum$cpu: $(taskset $cpu dd if=/dev/vda bs=1M skip=$((cpu * 16 - 16)) count=16 2>/dev/null |
                  md5sum | cut -d ' ' -f 1)) &
         done
         wait
         echo all: done",
    )
    .args(["--cpus", "2"]);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let disk = path("disk");
    random_file(disk.as_ref(), 32 << 20);
    let serve = |port: String, argument: String| {
        let mut nc = namespace.command("busybox");
        nc.args(["nc", "-l", "-p", &port, "-e", "dd", "bs=64k", &argument]);
        nc.args(["iflag=fullblock"]);
        Peer(nc.stderr(Stdio::null()).spawn().unwrap())
    };
    let mut peers = Vec::new();
    for cpu in 1..=2 {
        let (sent, received) = (path(&format!("sent{cpu}")), path(&format!("received{cpu}")));
        random_file(sent.as_ref(), 16 << 20);
        peers.push(serve(format!("500{cpu}"), format!("if={sent}")));
        peers.push(serve(format!("501{cpu}"), format!("of={received}")));
    }
    let guest = guest.args(["--disk", &format!("path={disk},queues=2")]);
    let mut running = namespace.start(guest);
    running.expect("net: ");
    // A TAP of several queues would let another VM attach.
    let ended = namespace.start(Guest::new("").args(["--cpus", "2"])).wait();
    assert_eq!(ended.code(), Some(3), "{ended:?}");
    assert!(ended.stderr.contains("another VM uses it"), "{ended:?}");
    let ended = running.wait();
    assert!(ended.stdout.contains("net: 2 disk: 2"), "{ended:?}");
    assert!(ended.stdout.contains("all: done"), "{ended:?}");
    for mut peer in peers {
        assert!(peer.0.wait().unwrap().success());
    }
    for cpu in 1..=2 {
        let sent = path(&format!("sent{cpu}"));
        tool("cmp", &[&sent, &path(&format!("received{cpu}"))]);
        let sum = tool("md5sum", &[&sent]);
        let sum = sum.split(' ').next().unwrap();
        let expected = format!("sum{cpu}: {sum}");
        assert!(ended.stdout.contains(&expected), "{expected}: {ended:?}");
    }
}
