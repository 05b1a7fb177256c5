//! What a template is for: it is taken where all of this is the same.

use mayfly_image::Digest;
use serde::{Deserialize, Serialize};

use super::build::own_build;
use super::host::Host;
use crate::failure::{Failure, OrFail};
use crate::spec::MachineSpec;

/// The version of what a template holds. Another one is another template.
pub const FORMAT: u32 = 1;

/// All that a template depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateKey {
    /// The version of what it holds, [`FORMAT`].
    pub format: u32,
    /// The build of mayfly that made it.
    pub mayfly: String,
    /// The digest of the guest's kernel.
    pub kernel: Digest,
    /// The digest of the initramfs, with the agent in it.
    pub agent: Digest,
    /// The machine, as its guest sees it.
    pub machine: MachineSpec,
    /// The host.
    pub host: Host,
}

impl TemplateKey {
    /// The key of a template that this program can take on a host.
    pub fn new(
        machine: MachineSpec,
        kernel: Digest,
        agent: Digest,
        host: Host,
    ) -> Result<Self, Failure> {
        Ok(TemplateKey {
            format: FORMAT,
            mayfly: own_build().or_host("this build of mayfly")?,
            kernel,
            agent,
            machine,
            host,
        })
    }

    /// Its digest: the template's name.
    pub fn digest(&self) -> Result<Digest, Failure> {
        let bytes = postcard::to_stdvec(self).or_internal("a template's key")?;
        Ok(Digest::of(&bytes))
    }

    /// How another template's key differs, as users are told.
    pub fn differences(&self, other: &TemplateKey) -> Vec<&'static str> {
        let (machine, others) = (&self.machine, &other.machine);
        let parts = [
            (self.format == other.format, "the templates' format"),
            (self.mayfly == other.mayfly, "mayfly"),
            (self.kernel == other.kernel, "the guest's kernel"),
            (self.agent == other.agent, "the agent"),
            (machine.memory == others.memory, "the memory"),
            (machine.cpus == others.cpus, "the number of CPUs"),
            (machine.devices == others.devices, "the devices"),
            (machine.cmdline == others.cmdline, "the command line"),
            (
                machine.version == others.version
                    && machine.boot_protocol == others.boot_protocol
                    && machine.nested == others.nested
                    && machine.watchdog == others.watchdog,
                "the machine",
            ),
        ];
        let different = parts.into_iter().filter(|(same, _)| !same);
        let mut told: Vec<_> = different.map(|(_, part)| part).collect();
        told.extend(self.host.differences(&other.host));
        told
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::spec::{BootProtocol, DeviceKind, DeviceSpec, MemorySpec, VERSION, WatchdogAction};

    /// A key that a test may have.
    pub fn key() -> TemplateKey {
        TemplateKey {
            format: FORMAT,
            mayfly: "build".into(),
            kernel: Digest::of(b"kernel"),
            agent: Digest::of(b"agent"),
            machine: MachineSpec {
                version: VERSION,
                cpus: 1,
                memory: MemorySpec {
                    size: 1 << 20,
                    ..Default::default()
                },
                cmdline: "quiet".into(),
                boot_protocol: BootProtocol::Auto,
                nested: false,
                watchdog: None,
                devices: vec![DeviceSpec {
                    name: "rng".into(),
                    kind: DeviceKind::Rng,
                }],
            },
            host: Host {
                kernel: "6.12".into(),
                cpu: "AMD".into(),
                microcode: "0x1".into(),
                cpuid: Digest::of(b"cpuid"),
                msrs: Digest::of(b"msrs"),
            },
        }
    }

    /// A change to a key.
    type Change = fn(&mut TemplateKey);

    #[test]
    fn every_part_makes_another_template_and_is_named() {
        let changes: [(&str, Change); 17] = [
            ("the templates' format", |key| key.format += 1),
            ("mayfly", |key| key.mayfly.push('2')),
            ("the guest's kernel", |key| key.kernel = Digest::of(b"2")),
            ("the agent", |key| key.agent = Digest::of(b"2")),
            ("the memory", |key| key.machine.memory.size *= 2),
            ("the memory", |key| key.machine.memory.shared = true),
            ("the number of CPUs", |key| key.machine.cpus = 2),
            ("the devices", |key| key.machine.devices.clear()),
            ("the command line", |key| key.machine.cmdline.push('2')),
            ("the machine", |key| key.machine.nested = true),
            ("the machine", |key| {
                key.machine.boot_protocol = BootProtocol::Pvh;
            }),
            ("the machine", |key| {
                key.machine.watchdog = Some(WatchdogAction::Nmi);
            }),
            ("the host's kernel", |key| key.host.kernel.push('2')),
            ("the host's CPU", |key| key.host.cpu.push('2')),
            ("the CPU's microcode", |key| key.host.microcode.push('2')),
            ("the CPUID that KVM supports", |key| {
                key.host.cpuid = Digest::of(b"2");
            }),
            ("KVM's set of MSRs", |key| key.host.msrs = Digest::of(b"2")),
        ];
        let key = key();
        let mut digests = vec![key.digest().unwrap()];
        for (part, change) in changes {
            let mut other = key.clone();
            change(&mut other);
            assert_eq!(key.differences(&other), [part]);
            let digest = other.digest().unwrap();
            assert!(!digests.contains(&digest), "{part}");
            digests.push(digest);
        }
        assert!(key.differences(&key.clone()).is_empty());
        // The key is the same when it was read from a manifest.
        let text = serde_json::to_vec(&key).unwrap();
        let read: TemplateKey = serde_json::from_slice(&text).unwrap();
        assert_eq!(read.digest().unwrap(), key.digest().unwrap());
    }
}
