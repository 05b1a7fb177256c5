//! What can be seen from inside an instance, beside what can be seen outside.

use mayfly_guest::facts::Facts;

use super::model::{EngineReport, Isolation, Kind};

/// Puts what is seen inside beside what is seen outside.
pub fn isolation(report: &EngineReport, facts: &Facts, host: &Facts) -> Isolation {
    let vm = report.kind == Kind::Vm;
    let hosts = |name: &str, inside: &str| {
        let same = |(other, id): &(String, String)| other == name && id == inside;
        // A guest's kernel has the same numbers for namespaces that are not the host's.
        !vm && host.namespaces.iter().any(same)
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
        if sees && !vm {
            sees_of_host.push(what.to_owned());
        }
    }
    Isolation {
        kernel: facts.kernel.clone(),
        host_kernel: !vm && facts.kernel == host.kernel,
        host_syscalls: match vm {
            true => Some(0),
            false => facts.syscalls,
        },
        monitor_syscalls: match report.name.as_str() {
            "mayfly" => crate::sandbox::calls_max(),
            _ => None,
        },
        devices: facts.devices.clone(),
        capabilities: capabilities(facts.capabilities),
        own_user_namespace: facts
            .namespaces
            .iter()
            .any(|(name, id)| !vm && name == "user" && !hosts(name, id)),
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

/// Names of `linux/capability.h`, in order.
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

fn capabilities(set: u64) -> Vec<String> {
    let there = (0..)
        .zip(CAPABILITIES)
        .filter(|(bit, _)| set >> bit & 1 == 1);
    there.map(|(_, name)| name.to_owned()).collect()
}
