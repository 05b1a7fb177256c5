//! Capabilities by their names (capabilities(7)), a bit each.

/// Names of `linux/capability.h`, in order.
const NAMES: [&str; 41] = [
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

/// What they are called, in the order of their bits.
pub fn names(set: u64) -> Vec<String> {
    let there = (0..).zip(NAMES).filter(|(bit, _)| set >> bit & 1 == 1);
    there.map(|(_, name)| name.to_owned()).collect()
}

/// The set of those that are called so.
pub fn set(names: &[&str]) -> u64 {
    let there = (0..).zip(NAMES).filter(|(_, name)| names.contains(name));
    there.fold(0, |set, (bit, _)| set | 1 << bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_the_names_that_made_it() {
        // CAP_CHOWN is 0, CAP_SYS_ADMIN 21, CAP_CHECKPOINT_RESTORE 40.
        let all = ["chown", "sys_admin", "checkpoint_restore"];
        assert_eq!(set(&all), 1 | 1 << 21 | 1 << 40);
        assert_eq!(names(set(&all)), all);
        assert_eq!(names(u64::MAX).len(), 41);
    }
}
