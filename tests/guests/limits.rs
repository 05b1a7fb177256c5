//! What a disk and a network move in a second, measured by the guest.

use std::fs::File;
use std::process::Stdio;

use mayfly_testing::guest::{Controlled, Guest};
use mayfly_testing::net::Namespace;
use mayfly_testing::tools::Peer;
use mayfly_testing::until;

/// How far off a rate may be.
const TOLERANCE: f64 = 0.05;
/// What is limited, before and after it is changed: bytes of a disk, requests
/// of another, bytes received, bytes sent. The network has one way at a time:
/// else the answers of one would wait behind the other's data.
const FIRST: [Option<f64>; 4] = [Some(1_048_576.0), Some(25.0), None, Some(500_000.0)];
const THEN: [Option<f64>; 4] = [Some(524_288.0), Some(50.0), Some(250_000.0), None];

/// The guest's clock in seconds, and what it has moved until then.
type Sample = [f64; 5];

fn samples(console: &str) -> Vec<Sample> {
    let whole = console.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let numbers = |line: &str| -> Option<Sample> {
        let words = line.strip_prefix("sample: ")?.split_whitespace();
        let numbers: Vec<f64> = words.map(|word| word.parse().unwrap()).collect();
        let [time, sectors, requests, received, sent] = numbers.try_into().unwrap();
        Some([time, sectors * 512.0, requests, received, sent])
    };
    whole.lines().filter_map(numbers).collect()
}

#[test]
fn rates_are_kept_and_changed_while_the_guest_runs() {
    let namespace = Namespace::with("limits", "tap", ",bw=500000");
    let guest = Guest::new(
        "samples() {
             while [ $1 -gt 0 ]; do
                 read now idle </proc/uptime
                 read a b sectors rest </sys/block/vda/stat
                 read requests rest </sys/block/vdb/stat
                 echo sample: $now $sectors $requests $(cat rx_bytes tx_bytes)
                 sleep 5
                 set $(($1 - 1))
             done
         }
         cd /sys/class/net/eth0/statistics
         cat /dev/vda >/dev/null &
         cat /dev/vdb >/dev/null &
         nc 10.9.0.1 5001 </dev/zero &
         sender=$!
         sleep 2
         samples 3
         kill $sender
         nc 10.9.0.1 5002 >/dev/null </dev/null &
         samples 1000",
    );
    let mut disks = Vec::new();
    for (name, keys) in [("a", "bw=1M"), ("b", "iops=25")] {
        let path = guest.path(name);
        File::create(&path).unwrap().set_len(4 << 30).unwrap();
        disks.push("--disk".to_owned());
        disks.push(format!("path={},ro,{keys}", path.display()));
    }
    let serve = |port: &str, program: [&str; 2]| {
        let mut nc = namespace.command("busybox");
        nc.args(["nc", "-l", "-p", port, "-e"]).args(program);
        Peer(nc.stderr(Stdio::null()).spawn().unwrap())
    };
    let _sink = serve("5001", ["dd", "of=/dev/null"]);
    let _source = serve("5002", ["cat", "/dev/zero"]);
    let vm = Controlled::start(guest.args(disks), |guest| namespace.start(guest));
    let taken = |count: usize| {
        until("a sample", || samples(&vm.running.console()).len() >= count);
        samples(&vm.running.console())
    };
    let check = |from: Sample, to: Sample, expected: [Option<f64>; 4]| {
        let time = to[0] - from[0];
        assert!(time >= 9.5, "{time} s");
        for (index, expected) in expected.into_iter().enumerate() {
            let Some(expected) = expected else { continue };
            let rate = (to[index + 1] - from[index + 1]) / time;
            let off = (rate / expected - 1.0).abs();
            assert!(off <= TOLERANCE, "{index}: {rate}, not {expected}");
        }
    };
    let first = taken(3);
    check(first[0], first[2], FIRST);
    vm.ctl(&["limit", "disk0", "bw=512K"]);
    vm.ctl(&["limit", "disk1", "iops=50"]);
    vm.ctl(&["limit", "net0", "bw=250000"]);
    let info = vm.info();
    assert_eq!(
        info["devices"][0]["limits"]["bandwidth"]["per-second"],
        512 << 10
    );
    // One sample later, the other direction has begun for sure.
    let count = samples(&vm.running.console()).len().max(4) + 1;
    let then = taken(count + 2);
    check(then[count - 1], then[count + 1], THEN);
    let metrics = vm.ctl(&["metrics"]);
    for device in ["disk0", "disk1", "net0"] {
        let name = format!("mayfly_device_throttled_total{{device=\"{device}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
        assert!(line.unwrap().parse::<f64>().unwrap() > 10.0, "{metrics}");
    }
    for (limits, reason) in [
        ("bw=0", "would stop"),
        ("iops=1", "not understood"),
        ("", "not understood"),
    ] {
        assert!(vm.refused(&["limit", "net0", limits]).contains(reason));
    }
    assert!(
        vm.refused(&["limit", "rng", "none"])
            .contains("has no limits")
    );
    assert!(
        vm.refused(&["limit", "disk7", "none"])
            .contains("no such device")
    );
    vm.ctl(&["limit", "disk0", "none"]);
}
