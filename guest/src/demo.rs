//! Prints what the guest sees of its machine.

use std::fs;

use crate::system;

const SECTOR: u64 = 512;

/// Prints kernel, CPUs, memory, disks and networks.
pub fn show() {
    let release = text("/proc/sys/kernel/osrelease");
    let uptime = text("/proc/uptime");
    println!(
        "kernel   Linux {release}, up for {} s",
        uptime.split(' ').next().unwrap_or_default()
    );
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpus = info
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    println!("cpus     {cpus}, {}", field(&info, "model name"));
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    println!(
        "memory   {} total, {} free",
        field(&memory, "MemTotal"),
        field(&memory, "MemFree")
    );
    list("disk", "/sys/block", "vd", |path| {
        let sectors: u64 = text(&format!("{path}/size")).parse().unwrap_or(0);
        let mode = match text(&format!("{path}/ro")).as_str() {
            "1" => "read-only",
            _ => "writable",
        };
        let serial = text(&format!("{path}/serial"));
        let mib = sectors.saturating_mul(SECTOR) >> 20;
        format!("{mib} MiB, {mode}, id {serial:?}")
    });
    list("network", "/sys/class/net", "eth", |path| {
        format!("MAC {}", text(&format!("{path}/address")))
    });
}

fn list(what: &str, directory: &str, prefix: &str, describe: impl Fn(&str) -> String) {
    let mut names = system::names(directory);
    names.retain(|name| name.starts_with(prefix));
    if names.is_empty() {
        println!("{what:<8} none");
    }
    for name in names {
        println!(
            "{what:<8} {name}: {}",
            describe(&format!("{directory}/{name}"))
        );
    }
}

fn text(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim_end().to_owned()
}

/// The value of the first line `NAME : VALUE`.
fn field<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map_or("?", |(_, value)| value.trim())
}
