//! Which layers of the sandbox there are, and how each fares on this host.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One of the walls, each of which holds without the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// Privileges within it are none outside.
    UserNamespace,
    /// An empty root, which cannot be written to.
    Mounts,
    /// No process can be named but its own.
    Pid,
    /// Nobody's System V and POSIX queues and memory.
    Ipc,
    /// A host name that is nobody's.
    Uts,
    /// The host's cgroups have no names.
    CgroupNamespace,
    /// Not even loopback.
    Network,
    /// A user who owns nothing.
    Uid,
    /// None, and none to be had.
    Capabilities,
    /// No program gives privileges.
    NoNewPrivileges,
    /// Memory is in no core dump, and nobody else's to read.
    NotDumpable,
    /// Of files, their sizes and core dumps.
    Limits,
    /// No descriptor that leads to others.
    Descriptors,
    /// No file, no TCP port, no foreign abstract socket or process.
    Landlock,
    /// Few system calls, by thread.
    Seccomp,
    /// Memory, CPU and processes.
    Cgroup,
}

impl Layer {
    /// All, from the outermost.
    pub const ALL: [Layer; 16] = [
        Layer::UserNamespace,
        Layer::Mounts,
        Layer::Pid,
        Layer::Ipc,
        Layer::Uts,
        Layer::CgroupNamespace,
        Layer::Network,
        Layer::Uid,
        Layer::Capabilities,
        Layer::NoNewPrivileges,
        Layer::NotDumpable,
        Layer::Limits,
        Layer::Descriptors,
        Layer::Landlock,
        Layer::Seccomp,
        Layer::Cgroup,
    ];

    /// The name for users.
    pub fn name(self) -> &'static str {
        match self {
            Layer::UserNamespace => "user namespace",
            Layer::Mounts => "empty root",
            Layer::Pid => "PID namespace",
            Layer::Ipc => "IPC namespace",
            Layer::Uts => "UTS namespace",
            Layer::CgroupNamespace => "cgroup namespace",
            Layer::Network => "network namespace",
            Layer::Uid => "unprivileged uid",
            Layer::Capabilities => "no capabilities",
            Layer::NoNewPrivileges => "no new privileges",
            Layer::NotDumpable => "not dumpable",
            Layer::Limits => "resource limits",
            Layer::Descriptors => "descriptors",
            Layer::Landlock => "Landlock",
            Layer::Seccomp => "seccomp",
            Layer::Cgroup => "cgroup",
        }
    }

    /// What an administrator can do where it is missing.
    pub fn remedy(self) -> &'static str {
        match self {
            Layer::UserNamespace
            | Layer::Mounts
            | Layer::Pid
            | Layer::Ipc
            | Layer::Uts
            | Layer::CgroupNamespace
            | Layer::Capabilities => {
                "allow user namespaces: see the sysctls user.max_*_namespaces, \
                 kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns"
            }
            Layer::Network => {
                "allow network namespaces: see the sysctl user.max_net_namespaces, and \
                 mayfly's own flags"
            }
            Layer::Uid => "start mayfly where uids from 0x71000000 may be mapped, or not as root",
            Layer::NoNewPrivileges | Layer::NotDumpable | Layer::Limits | Layer::Descriptors => {
                "report this, as every Linux has it"
            }
            Layer::Landlock => "boot a kernel with CONFIG_SECURITY_LANDLOCK and lsm=landlock,…",
            Layer::Seccomp => "boot a kernel with CONFIG_SECCOMP_FILTER",
            Layer::Cgroup => "start mayfly in a delegated cgroup: systemd-run --user --scope",
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The state of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It stands.
    Active,
    /// This host does not have it, or not all of it: why.
    Absent(String),
    /// It was turned off.
    Off,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::Active => f.write_str("active"),
            Status::Absent(why) => write!(f, "absent on this host: {why}"),
            Status::Off => f.write_str("turned off"),
        }
    }
}

/// How all layers fare; it has a line for each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report(Vec<(Layer, Status)>);

impl Report {
    /// The report of a VMM without a sandbox.
    pub fn off() -> Self {
        Report(Layer::ALL.map(|layer| (layer, Status::Off)).into())
    }

    /// Notes how one fares.
    pub fn set(&mut self, layer: Layer, status: Status) {
        self.0.retain(|(known, _)| *known != layer);
        self.0.push((layer, status));
        self.0.sort_by_key(|(layer, _)| *layer);
    }

    /// How one fares, if that is known.
    pub fn get(&self, layer: Layer) -> Option<&Status> {
        let mut all = self.0.iter();
        all.find(|(known, _)| *known == layer)
            .map(|(_, status)| status)
    }

    /// All that is known.
    pub fn iter(&self) -> impl Iterator<Item = &(Layer, Status)> {
        self.0.iter()
    }

    /// The first that this host lacks, and why.
    pub fn missing(&self) -> Option<(Layer, &str)> {
        self.0.iter().find_map(|(layer, status)| match status {
            Status::Absent(why) => Some((*layer, why.as_str())),
            _ => None,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (layer, status) in &self.0 {
            writeln!(f, "{layer:<18} {status}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_keeps_its_order_and_survives_json() {
        let mut report = Report::off();
        report.set(Layer::Seccomp, Status::Active);
        report.set(Layer::Mounts, Status::Absent("no room".into()));
        let layers: Vec<_> = report.iter().map(|(layer, _)| *layer).collect();
        assert_eq!(layers, Layer::ALL);
        assert_eq!(report.missing(), Some((Layer::Mounts, "no room")));
        let text = report.to_string();
        assert!(text.contains("empty root         absent on this host: no room\n"));
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }
}
