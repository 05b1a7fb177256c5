//! What can be seen from inside an instance, beside what can be seen outside.

use mayfly_protocol::facts::Facts;

use super::capabilities;
use super::model::{EngineReport, Isolation};

/// Puts what is seen inside beside what is seen outside.
pub fn isolation(
    report: &EngineReport,
    facts: &Facts,
    host: &Facts,
    mayflys_calls: Option<u32>,
) -> Isolation {
    let shared = same_kernel(facts, host);
    // Another kernel has the same numbers for namespaces that are not the host's, and may
    // have as many CPUs.
    let hosts = |name: &str, inside: &str| {
        let same = |(other, id): &(String, String)| other == name && id == inside;
        shared && host.namespaces.iter().any(same)
    };
    let mut sees_of_host = Vec::new();
    for (what, sees) in [
        ("memory", facts.memory_kib == host.memory_kib),
        ("cpus", facts.cpus == host.cpus),
        ("command line", facts.command_line == host.command_line),
        (
            "modules",
            facts.modules == host.modules && facts.modules > 0,
        ),
        ("processes", facts.processes.abs_diff(host.processes) <= 2),
    ] {
        if sees && shared {
            sees_of_host.push(what.to_owned());
        }
    }
    Isolation {
        kernel: facts.kernel.clone(),
        host_kernel: shared,
        host_syscalls: match shared {
            true => facts.syscalls,
            false => Some(0),
        },
        monitor_syscalls: match report.name.as_str() {
            "mayfly" | "mayfly-cold" => mayflys_calls,
            _ => None,
        },
        devices: facts.devices.clone(),
        capabilities: capabilities::names(facts.capabilities),
        own_user_namespace: facts
            .namespaces
            .iter()
            .any(|(name, id)| shared && name == "user" && !hosts(name, id)),
        namespaces: facts.namespaces.iter().cloned().collect(),
        host_namespaces: facts
            .namespaces
            .iter()
            .filter(|(name, id)| hosts(name, id))
            .map(|(name, _)| name.clone())
            .collect(),
        sees_of_host,
        seccomp: facts.seccomp,
    }
}

/// Whether both saw one kernel, whatever the engine is said to be. Where its boot cannot be
/// told, a kernel of the same release is taken for the host's.
fn same_kernel(facts: &Facts, host: &Facts) -> bool {
    match facts.boot_id.as_str() {
        "" => facts.kernel.is_empty() || facts.kernel == host.kernel,
        boot => boot == host.boot_id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    fn facts(kernel: &str, boot_id: &str) -> Facts {
        let namespaces = [("pid", "pid:[4026531836]"), ("user", "user:[4026531837]")];
        Facts {
            kernel: kernel.into(),
            boot_id: boot_id.into(),
            namespaces: namespaces
                .map(|(name, id)| (name.into(), id.into()))
                .to_vec(),
            capabilities: 0,
            seccomp: 0,
            devices: Vec::new(),
            memory_kib: 1,
            cpus: 1,
            command_line: String::new(),
            modules: 0,
            processes: 1,
            syscalls: Some(300),
        }
    }

    /// Debian's podman may run a VM, and a user's program anything: only the kernel tells.
    #[test]
    fn whose_kernel_it_is_is_seen_and_not_said() {
        let host = facts("6.12", "a");
        for (seen, shared) in [
            (facts("6.12", "a"), true),
            (facts("6.12", "b"), false),
            (facts("4.4", ""), false),
            (facts("6.12", ""), true),
            (facts("", ""), true),
        ] {
            for kind in [Kind::Process, Kind::Container, Kind::Vm, Kind::Own] {
                let report = EngineReport::new("it", kind);
                let found = isolation(&report, &seen, &host, None);
                assert_eq!(found.host_kernel, shared, "{seen:?}");
                assert_eq!(found.host_syscalls, Some(if shared { 300 } else { 0 }));
                assert_eq!(found.host_namespaces.len(), if shared { 2 } else { 0 });
                assert_eq!(found.sees_of_host.is_empty(), !shared);
                assert_eq!(found.namespaces["pid"], "pid:[4026531836]");
            }
        }
    }
}
