//! What this host can do for VMs, found out by trying, not by guessing.

use std::fmt;
use std::fs::{self, OpenOptions};

use kvm_ioctls::Kvm;
use mayfly_devices::virtio::block::try_ring;
use mayfly_sandbox::{self as sandbox, Cgroup, Layer, Mode, Policy, Share, Status};
use serde::Serialize;

use crate::failure::OrFail;
use crate::guests::Guests;
use crate::kvm::accept::AcceptKvm;
use crate::kvm::probe::{self, Backend};
use crate::kvm::vm;
use crate::net::passt;
use crate::virtiofsd;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Fine.
    Ok,
    /// VMs run without it, less well or with fewer features.
    Missing,
    /// No VM can run.
    Fatal,
}

/// One thing about the host.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Missing => "missing",
            Verdict::Fatal => "FATAL",
        };
        write!(f, "{:<19}{verdict:<9}{}", self.name, self.found)?;
        match &self.remedy {
            Some(remedy) => write!(f, "\n{:<28}{remedy}", ""),
            None => Ok(()),
        }
    }
}

fn ok(name: &'static str, found: impl Into<String>) -> Check {
    Check {
        name,
        verdict: Verdict::Ok,
        found: found.into(),
        remedy: None,
    }
}

fn bad(name: &'static str, verdict: Verdict, found: impl Into<String>, remedy: &str) -> Check {
    Check {
        name,
        verdict,
        found: found.into(),
        remedy: Some(remedy.to_owned()),
    }
}

/// Looks at everything.
pub fn examine(accept: AcceptKvm) -> Vec<Check> {
    let mut checks = Vec::new();
    match vm::open() {
        Ok(kvm) => {
            checks.push(ok("/dev/kvm", "present and permitted"));
            checks.push(backend(&kvm, accept));
        }
        Err(error) => {
            let found = Err::<(), _>(error)
                .or_host("KVM")
                .map_or_else(|f| f.to_string(), |()| String::new());
            let remedy = "without KVM, scripts/mayfly runs VMs in a software lab";
            checks.push(bad("/dev/kvm", Verdict::Fatal, found, remedy));
        }
    }
    checks.extend([
        io_uring(),
        tap(),
        user_network(),
        folders(),
        memory(),
        guest(),
    ]);
    checks.extend(sandbox());
    checks
}

fn backend(kvm: &Kvm, accept: AcceptKvm) -> Check {
    const NAME: &str = "KVM backend";
    let flag = match probe::cpu_flag() {
        Some(flag) => format!("the CPU has {flag}"),
        None => "the CPU shows neither vmx nor svm".to_owned(),
    };
    match probe::measure(kvm) {
        Backend::Hardware => ok(NAME, format!("runs guest code on the CPU ({flag})")),
        Backend::Emulated(time) if accept.accept_kvm => bad(
            NAME,
            Verdict::Missing,
            format!(
                "emulates guest code that does not know of it ({} ms for 0.1 ms; {flag}), and is accepted",
                time.as_millis()
            ),
            "only kernels that this KVM runs natively will boot, as --accept-kvm is given",
        ),
        Backend::Emulated(time) if probe::cpu_flag().is_none() => bad(
            NAME,
            Verdict::Fatal,
            format!(
                "emulates guest code, {} ms for what a CPU does in 0.1 ms ({flag}; PVM?)",
                time.as_millis()
            ),
            "Linux cannot run on it; use a host with VT-x or AMD-V, or scripts/mayfly, which has a software lab",
        ),
        Backend::Emulated(time) => bad(
            NAME,
            Verdict::Missing,
            format!(
                "runs guest code slowly, {} ms for 0.1 ms ({flag})",
                time.as_millis()
            ),
            "VMs run, slowly: this host is busy, or is itself emulated",
        ),
        Backend::Unknown => bad(
            NAME,
            Verdict::Fatal,
            format!("cannot run a VM of a few instructions ({flag})"),
            "see the kernel's log: dmesg | grep -i kvm",
        ),
    }
}

fn io_uring() -> Check {
    const NAME: &str = "io_uring";
    match try_ring() {
        Ok(()) => ok(NAME, "allowed"),
        Err(error) => bad(
            NAME,
            Verdict::Missing,
            format!("refused: {error}"),
            "disks use threads instead; to allow it: sysctl kernel.io_uring_disabled=0",
        ),
    }
}

fn tap() -> Check {
    const NAME: &str = "TAP";
    let path = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => ok(NAME, format!("{path} is permitted")),
        Err(error) => bad(
            NAME,
            Verdict::Missing,
            format!("{path}: {error}"),
            "networks need it: modprobe tun, and chmod 666 /dev/net/tun (as most systems have it)",
        ),
    }
}

fn user_network() -> Check {
    const NAME: &str = "user network";
    match passt::program() {
        Some(path) => ok(NAME, format!("{}", path.display())),
        None => bad(
            NAME,
            Verdict::Missing,
            "passt is not installed",
            "--net user needs it: apt install passt",
        ),
    }
}

fn folders() -> Check {
    const NAME: &str = "folders";
    match virtiofsd::find() {
        Some(path) => ok(NAME, format!("{}", path.display())),
        None => bad(
            NAME,
            Verdict::Missing,
            "virtiofsd is not installed",
            "run --volume needs it: apt install virtiofsd (Debian 12: qemu-system-common)",
        ),
    }
}

/// What would surround a VM's process, a line for each layer.
fn sandbox() -> Vec<Check> {
    let policy = Policy {
        mode: Mode::On,
        new_net: true,
    };
    let mut report = match sandbox::probe(&policy) {
        Ok(report) => report,
        Err(error) => {
            let remedy = "see the kernel's log: dmesg";
            return vec![bad("sandbox", Verdict::Fatal, error.to_string(), remedy)];
        }
    };
    let cgroup = Cgroup::make(&Share {
        cpus: 1,
        memory: 512 << 20,
        nets: 0,
        directories: 0,
    });
    report.set(Layer::Cgroup, cgroup.status().clone());
    let check = |(layer, status): &(Layer, Status)| match status {
        Status::Active => ok(layer.name(), "active"),
        status => bad(
            layer.name(),
            Verdict::Missing,
            status.to_string(),
            layer.remedy(),
        ),
    };
    report.iter().map(check).collect()
}

fn memory() -> Check {
    const NAME: &str = "memory";
    const COMFORTABLE: u64 = 256 << 20;
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|value| value.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .unwrap_or(0)
        << 10;
    let found = format!("{} MiB available", available >> 20);
    match available {
        COMFORTABLE.. => ok(NAME, found),
        _ => bad(
            NAME,
            Verdict::Missing,
            found,
            "end other programs, or give VMs less",
        ),
    }
}

fn guest() -> Check {
    const NAME: &str = "guest kernel";
    match Guests::locate().ok().and_then(|all| all.default_guest()) {
        Some(guest) => ok(
            NAME,
            format!("{}, {}", guest.name(), guest.kernel().display()),
        ),
        None => bad(
            NAME,
            Verdict::Missing,
            "none made",
            "the first mayfly run or boot makes one; or mayfly guest make",
        ),
    }
}
