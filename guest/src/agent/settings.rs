//! What the kernel allows, and how much of it.

#![allow(unsafe_code, reason = "limits of resources")]

use std::fs::{self, File};
use std::io::{self, Write};

use mayfly_protocol::agent::Sysctl;

use super::command::plain;

/// Settings of a kernel that serves one image: what Docker gives a container, or what the
/// systems on whose hosts containers run have set. Linux' own are for small machines, or
/// grow with memory, and a VM's is little.
const DEFAULTS: [(&str, &str); 9] = [
    // Docker: everyone may have low ports, and ping.
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    // As Fedora and Ubuntu have it: OpenSearch and others refuse to start with 65530.
    ("vm/max_map_count", "1048576"),
    // What installations of databases ask for.
    ("fs/aio-max-nr", "1048576"),
    // As systemd has them.
    ("fs/file-max", "9223372036854775807"),
    ("kernel/pid_max", "4194304"),
    // As much as the kernel gives where there is much memory.
    ("fs/inotify/max_user_watches", "1048576"),
    ("fs/inotify/max_user_instances", "1024"),
    ("net/core/somaxconn", "4096"),
];
/// A machine whose programs are read from disk again and again, as there is no
/// memory left to keep them, shall end a process soon: it may else work on that for
/// minutes (Linux' `Documentation/admin-guide/mm/multigen_lru.rst`).
const NO_THRASHING: [(&str, &str); 2] = [
    ("/sys/kernel/mm/lru_gen/enabled", "y"),
    ("/sys/kernel/mm/lru_gen/min_ttl_ms", "1000"),
];
const SYSCTLS: &str = "/proc/sys";
/// How many files a process may have open, as in Docker: the kernel's own limit.
const FILES_MAX: libc::rlim_t = 1 << 20;

/// Gives processes what they have elsewhere, as far as this kernel can: few miss it.
pub fn apply_defaults() {
    for (path, value) in DEFAULTS {
        let _ = fs::write(format!("{SYSCTLS}/{path}"), value);
    }
    for (path, value) in NO_THRASHING {
        let _ = fs::write(path, value);
    }
    // A user's processes are bounded by the machine alone, as in Docker; the kernel's own
    // limit is for the memory that there is.
    for (resource, limit) in [
        (libc::RLIMIT_NOFILE, FILES_MAX),
        (libc::RLIMIT_NPROC, libc::RLIM_INFINITY),
    ] {
        let limit = libc::rlimit {
            rlim_cur: limit,
            rlim_max: limit,
        };
        // Processes inherit it.
        // SAFETY: reads a live structure.
        unsafe { libc::setrlimit(resource, &limit) };
    }
}

/// Sets what the user wants.
pub fn apply(sysctls: &[Sysctl]) -> Result<(), String> {
    for sysctl in sysctls {
        let path = format!("{SYSCTLS}/{}", sysctl.path);
        set(&path, &sysctl.value).map_err(|error| {
            let why = match error.kind() {
                io::ErrorKind::NotFound => "the guest's kernel has no such setting".to_owned(),
                _ => format!("the guest's kernel refuses it: {}", plain(&error)),
            };
            let value = String::from_utf8_lossy(&sysctl.value);
            format!("--sysctl {}={value}: {why}", sysctl.name)
        })?;
    }
    Ok(())
}

/// In one piece, as settings are taken.
fn set(path: &str, value: &[u8]) -> io::Result<()> {
    let mut file = File::options().write(true).open(path)?;
    file.write_all(&[value, b"\n"].concat())
}
