//! The machine that a comparison runs on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::model::Host;

const KIB_A_MIB: u64 = 1024;
/// The part of the CPUs' time taken by other machines that makes times doubtful.
const MUCH_STOLEN: f64 = 0.01;

/// Describes this host.
pub fn describe() -> Host {
    let cpus = read("/proc/cpuinfo");
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
        memory_mib: memory_mib("MemTotal"),
        system: field(&read("/etc/os-release"), "PRETTY_NAME", '=').unwrap_or_default(),
        virtualised: below.then(|| match vendor.as_str() {
            "" => "a virtual machine".to_owned(),
            vendor => format!("a virtual machine ({vendor})"),
        }),
        root: rustix::process::geteuid().is_root(),
        governor: governor(),
        turbo: turbo(),
        load_before: load(),
        load_after: load(),
        stolen: 0.0,
        namespaces: BTreeMap::new(),
    }
}

/// What changes on it while a comparison runs.
pub struct Watch(Times);

impl Watch {
    /// From now on.
    pub fn start() -> Self {
        Watch(Times::of(&read("/proc/stat")))
    }

    /// Until now.
    pub fn end(self, host: &mut Host) {
        host.load_after = load();
        host.stolen = Times::of(&read("/proc/stat")).stolen_since(&self.0);
    }
}

/// What on it makes times doubtful, in words.
pub fn warnings(host: &Host) -> Vec<String> {
    let mut warnings = Vec::new();
    if host.load_before > f64::from(host.cpus) {
        warnings.push(format!(
            "The host was busy before the comparison began: a load of {:.1} on {} CPUs.",
            host.load_before, host.cpus
        ));
    }
    if host.stolen > MUCH_STOLEN {
        warnings.push(format!(
            "Other machines took {:.0} % of this one's CPU time meanwhile.",
            100.0 * host.stolen
        ));
    }
    warnings
}

/// What processes may still take, in MiB.
pub fn memory_available_mib() -> u64 {
    memory_mib("MemAvailable")
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn field(text: &str, name: &str, mark: char) -> Option<String> {
    let mut lines = text.lines().filter_map(|line| line.split_once(mark));
    let value = lines.find(|(key, _)| key.trim() == name);
    value.map(|(_, value)| value.trim().trim_matches('"').to_owned())
}

fn memory_mib(name: &str) -> u64 {
    let text = field(&read("/proc/meminfo"), name, ':').unwrap_or_default();
    let kib: u64 = text.trim_end_matches(" kB").parse().unwrap_or(0);
    kib / KIB_A_MIB
}

/// The load average of the last minute.
fn load() -> f64 {
    let text = read("/proc/loadavg");
    let first = text.split_whitespace().next();
    first.and_then(|it| it.parse().ok()).unwrap_or(0.0)
}

/// What decides the CPUs' clock rate, and whose: `powersave (intel_pstate)`.
fn governor() -> Option<String> {
    let cpus = fs::read_dir("/sys/devices/system/cpu").ok()?.flatten();
    let found: BTreeSet<String> = cpus
        .filter_map(|cpu| {
            let of = |name| fs::read_to_string(cpu.path().join("cpufreq").join(name)).ok();
            let governor = of("scaling_governor")?;
            let driver = of("scaling_driver").unwrap_or_default();
            Some(format!("{} ({})", governor.trim(), driver.trim()))
        })
        .collect();
    let all: Vec<String> = found.into_iter().collect();
    Some(all.join(", ")).filter(|it| !it.is_empty())
}

/// Whether a CPU may be faster than its nominal rate, where that can be seen.
fn turbo() -> Option<bool> {
    let of = |name: &str| fs::read_to_string(format!("/sys/devices/system/cpu/{name}")).ok();
    let boost = of("cpufreq/boost").map(|it| it.trim() == "1");
    boost.or_else(|| of("intel_pstate/no_turbo").map(|it| it.trim() == "0"))
}

/// The CPUs' time since boot, in ticks.
struct Times {
    all: u64,
    stolen: u64,
}

impl Times {
    /// `/proc/stat`: user, nice, system, idle, iowait, irq, softirq and steal; what follows
    /// is part of those.
    fn of(stat: &str) -> Self {
        const COUNTED: usize = 8;
        let words = stat.lines().next().unwrap_or_default().split_whitespace();
        let times = words.skip(1).take(COUNTED);
        let times: Vec<u64> = times.filter_map(|it| it.parse().ok()).collect();
        Times {
            all: times.iter().sum(),
            stolen: times.get(COUNTED - 1).copied().unwrap_or(0),
        }
    }

    /// The part of them that another machine had, from 0 to 1.
    fn stolen_since(&self, before: &Times) -> f64 {
        let all = self.all.saturating_sub(before.all).max(1);
        self.stolen.saturating_sub(before.stolen) as f64 / all as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_take_is_a_part_of_all_time() {
        let before = Times::of("cpu  100 0 50 800 10 0 5 35 70 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n");
        let after = Times::of("cpu  150 0 50 830 10 0 5 55 90 0\n");
        assert!((after.stolen_since(&before) - 0.2).abs() < 1e-9);
        assert_eq!(after.stolen_since(&after), 0.0);
        assert_eq!(Times::of("").stolen_since(&before), 0.0);
    }

    #[test]
    fn a_busy_host_is_warned_of() {
        let mut host = Host {
            cpus: 4,
            load_before: 3.9,
            stolen: 0.001,
            ..Host::default()
        };
        assert_eq!(warnings(&host), [""; 0]);
        (host.load_before, host.stolen) = (6.0, 0.25);
        let told = warnings(&host);
        assert!(told[0].contains("a load of 6.0 on 4 CPUs"), "{told:?}");
        assert!(told[1].contains("took 25 %"), "{told:?}");
    }
}
