//! The machine that a comparison runs on.

use std::fs;

use super::model::Host;

const KIB_A_MIB: u64 = 1024;

/// Looks.
pub fn look() -> Host {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str, mark: char| {
        let mut lines = text.lines().filter_map(|line| line.split_once(mark));
        let value = lines.find(|(key, _)| key.trim() == name);
        value.map(|(_, value)| value.trim().trim_matches('"').to_owned())
    };
    let cpus = read("/proc/cpuinfo");
    let memory = field(&read("/proc/meminfo"), "MemTotal", ':').unwrap_or_default();
    let memory: u64 = memory.trim_end_matches(" kB").parse().unwrap_or(0);
    let below = cpus
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"));
    let vendor = read("/sys/class/dmi/id/sys_vendor").trim().to_owned();
    Host {
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        cpu: field(&cpus, "model name", ':').unwrap_or_default(),
        cpus: std::thread::available_parallelism()
            .ok()
            .and_then(|count| u32::try_from(count.get()).ok())
            .unwrap_or(1),
        memory_mib: memory / KIB_A_MIB,
        system: field(&read("/etc/os-release"), "PRETTY_NAME", '=').unwrap_or_default(),
        virtualised: below.then(|| match vendor.as_str() {
            "" => "a virtual machine".to_owned(),
            vendor => format!("a virtual machine ({vendor})"),
        }),
        root: rustix::process::geteuid().is_root(),
    }
}
