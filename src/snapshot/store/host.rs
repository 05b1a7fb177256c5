//! The host that a machine's state is of.

use std::fs::File;
use std::io::{self, Read};

use kvm_ioctls::Kvm;
use mayfly_image::Digest;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, OrFail};
use crate::kvm::features::features;

const CPU_INFO: &str = "/proc/cpuinfo";
/// Enough for one CPU. Linux looks at each CPU of which it tells, so all would take long.
const CPU_INFO_READ: usize = 4096;
/// The lines that say what a CPU is; others say how fast it runs at present.
const CPU_LINES: [&str; 5] = ["vendor_id", "cpu family", "model", "model name", "stepping"];
const MICROCODE: &str = "microcode";

/// What of a host a saved machine depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// The release and the version of its kernel.
    pub kernel: String,
    /// The CPU's maker, family, model, name and stepping.
    pub cpu: String,
    /// The version of the CPU's microcode.
    pub microcode: String,
    /// The digest of the CPUID that KVM supports.
    pub cpuid: Digest,
    /// The digest of KVM's registers: those that it saves, and those that tell of features.
    pub msrs: Digest,
}

impl Host {
    /// This one.
    pub fn this(kvm: &Kvm) -> Result<Self, Failure> {
        let name = rustix::system::uname();
        let kernel = format!(
            "{} {}",
            name.release().to_string_lossy(),
            name.version().to_string_lossy()
        );
        let info = cpu_info().or_host(CPU_INFO)?;
        let cpu: Vec<_> = { CPU_LINES.iter() }
            .filter_map(|name| value(&info, name))
            .collect();
        let features = features(kvm).or_host("this host's features")?;
        Ok(Host {
            kernel,
            cpu: cpu.join(" "),
            microcode: value(&info, MICROCODE).unwrap_or_default().to_owned(),
            cpuid: Digest::of(&features.cpuid),
            msrs: Digest::of(&features.msrs),
        })
    }

    /// How another host differs, as users are told.
    pub fn differences(&self, other: &Host) -> Vec<&'static str> {
        let parts = [
            (self.kernel == other.kernel, "the host's kernel"),
            (self.cpu == other.cpu, "the host's CPU"),
            (self.microcode == other.microcode, "the CPU's microcode"),
            (self.cpuid == other.cpuid, "the CPUID that KVM supports"),
            (self.msrs == other.msrs, "KVM's set of MSRs"),
        ];
        let other = parts.into_iter().filter(|(same, _)| !same);
        other.map(|(_, part)| part).collect()
    }
}

/// What Linux tells of the first CPU.
fn cpu_info() -> io::Result<String> {
    let mut info = vec![0; CPU_INFO_READ];
    let count = File::open(CPU_INFO)?.read(&mut info)?;
    info.truncate(count);
    Ok(String::from_utf8_lossy(&info).into_owned())
}

/// What stands behind the first line of a name.
fn value<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = info.lines().filter_map(|line| line.split_once(':'));
    lines
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_itself_at_all_times() {
        let kvm = Kvm::new().unwrap();
        let host = Host::this(&kvm).unwrap();
        assert!(host.cpu.len() > 3 && !host.kernel.is_empty());
        let again = Host::this(&kvm).unwrap();
        assert!(host.differences(&again).is_empty());
        let other = Host {
            kernel: "6.1".into(),
            microcode: "0x0".into(),
            ..again
        };
        let told = host.differences(&other);
        assert_eq!(told, ["the host's kernel", "the CPU's microcode"]);
    }
}
