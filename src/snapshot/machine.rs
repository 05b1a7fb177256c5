//! A machine that does not run: all of its state but its memory.

use std::fs::File;

use mayfly_devices::cmos::CmosState;
use mayfly_devices::ged::GedState;
use mayfly_devices::serial::SerialState;
use mayfly_devices::snapshot_port::SnapshotPortState;
use mayfly_devices::virtio::state::VirtioState;
use mayfly_devices::watchdog::WatchdogState;
use serde::{Deserialize, Serialize};

use super::format::{FormatError, Reader, Section, Writer};
use super::kvm::KvmState;
use crate::spec::MachineSpec;

/// Why a machine cannot go on from a state file.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The file is none of this version's, or damaged.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The machine's specification cannot be written.
    #[error("the machine's specification")]
    Shape(#[source] serde_json::Error),
    /// It is another machine's.
    #[error("it is the state of another machine: {0}")]
    Other(&'static str),
}

/// The virtio devices' states, in the specification's order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStates(pub Vec<VirtioState>);

impl Section for DeviceStates {
    const NAME: &'static str = "devices";
    const VERSION: u16 = 1;
}

/// The states of the devices that every machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformState {
    /// The serial port.
    pub serial: SerialState,
    /// The clock.
    pub cmos: CmosState,
    /// The register of events.
    pub ged: GedState,
    /// The watchdog, if there is one.
    pub watchdog: Option<WatchdogState>,
    /// Where the guest's mailbox is.
    pub snapshot_port: SnapshotPortState,
}

impl Section for PlatformState {
    const NAME: &'static str = "platform";
    const VERSION: u16 = 1;
}

/// The machine's specification, but for what its guest cannot tell by its state: JSON, as
/// that leaves out what has not been set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Shape(String);

impl Section for Shape {
    const NAME: &'static str = "shape";
    const VERSION: u16 = 1;
}

impl Shape {
    fn of(spec: &MachineSpec) -> Result<Self, MachineError> {
        let text = serde_json::to_string(&spec.shape());
        text.map(Shape).map_err(MachineError::Shape)
    }
}

impl MachineError {
    /// The file is no state of such a machine, now and ever: it was not the host that failed.
    pub fn is_final(&self) -> bool {
        match self {
            MachineError::Format(FormatError::Read(_)) | MachineError::Shape(_) => false,
            MachineError::Format(_) | MachineError::Other(_) => true,
        }
    }
}

/// All of a machine's state but its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineState {
    /// What KVM holds.
    pub kvm: KvmState,
    /// The virtio devices.
    pub devices: DeviceStates,
    /// The other devices.
    pub platform: PlatformState,
}

impl MachineState {
    /// The bytes of the state file of a machine of a specification.
    pub fn to_bytes(&self, spec: &MachineSpec) -> Result<Vec<u8>, MachineError> {
        let mut writer = Writer::new();
        writer.add(&Shape::of(spec)?)?;
        writer.add(&self.kvm)?;
        writer.add(&self.devices)?;
        writer.add(&self.platform)?;
        Ok(writer.finish())
    }

    /// Reads the state file of a machine that is to be one of a specification.
    pub fn read(file: &File, spec: &MachineSpec) -> Result<Self, MachineError> {
        let mut reader = Reader::read(file)?;
        if reader.take::<Shape>()? != Shape::of(spec)? {
            return Err(MachineError::Other("its specification differs"));
        }
        let state = MachineState {
            kvm: reader.take()?,
            devices: reader.take()?,
            platform: reader.take()?,
        };
        reader.finish()?;
        if state.kvm.vcpus.len() != usize::from(spec.cpus) {
            return Err(MachineError::Other("it has another number of vCPUs"));
        }
        if state.devices.0.len() != spec.devices.len() {
            return Err(MachineError::Other("it has another number of devices"));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::kvm::state::{StateScope, VcpuState};
    use crate::kvm::vcpu::Vcpu;
    use crate::kvm::vm::{self, Vm};
    use crate::spec::{BlockSpec, DeviceKind, DeviceSpec, MemorySpec, VERSION};

    fn spec() -> MachineSpec {
        MachineSpec {
            version: VERSION,
            cpus: 1,
            memory: MemorySpec::default(),
            cmdline: "quiet".into(),
            boot_protocol: crate::spec::BootProtocol::Auto,
            nested: false,
            watchdog: None,
            devices: Vec::new(),
        }
    }

    /// The state of a machine that never ran, if this user has KVM.
    fn state() -> Option<MachineState> {
        let kvm = vm::open().ok()?;
        let scope = StateScope::of(&kvm).unwrap();
        let vm = Vm::new(&kvm).unwrap();
        let vcpu = Vcpu::new(&vm, 0, 1, false).unwrap();
        let vcpus: Vec<VcpuState> = vec![vcpu.save(&scope).unwrap()];
        let vm = vm.save().unwrap();
        Some(MachineState {
            kvm: KvmState { vm, vcpus },
            devices: DeviceStates(Vec::new()),
            platform: PlatformState {
                snapshot_port: SnapshotPortState { mailbox: 0x5000 },
                ..PlatformState::default()
            },
        })
    }

    fn file(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    #[test]
    fn a_state_comes_back_for_its_machine_alone() {
        let Some(state) = state() else {
            return eprintln!("not tested: there is no KVM");
        };
        let bytes = state.to_bytes(&spec()).unwrap();
        assert_eq!(MachineState::read(&file(&bytes), &spec()).unwrap(), state);
        type Change = fn(&mut MachineSpec);
        let others: [Change; 4] = [
            |spec| spec.cpus = 2,
            |spec| spec.memory.size *= 2,
            |spec| spec.cmdline.push('2'),
            |spec| {
                spec.devices.push(DeviceSpec {
                    name: "rng".into(),
                    kind: DeviceKind::Rng,
                });
            },
        ];
        for change in others {
            let mut other = spec();
            change(&mut other);
            let read = MachineState::read(&file(&bytes), &other);
            assert!(matches!(read, Err(MachineError::Other(_))), "{other:?}");
        }
    }

    #[test]
    fn damage_is_found_wherever_it_is() {
        let Some(state) = state() else {
            return eprintln!("not tested: there is no KVM");
        };
        let bytes = state.to_bytes(&spec()).unwrap();
        for at in (0..bytes.len()).step_by(37) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(
                MachineState::read(&file(&damaged), &spec()).is_err(),
                "{at}"
            );
            let cut = file(&bytes[..at]);
            assert!(MachineState::read(&cut, &spec()).is_err(), "{at}");
        }
    }

    #[test]
    fn a_state_that_contradicts_its_machine_is_refused() {
        let Some(state) = state() else {
            return eprintln!("not tested: there is no KVM");
        };
        let without = |change: fn(&mut MachineState)| {
            let mut other = state.clone();
            change(&mut other);
            let bytes = other.to_bytes(&spec()).unwrap();
            MachineState::read(&file(&bytes), &spec())
        };
        assert!(without(|_| ()).is_ok());
        let vcpus = without(|state| state.kvm.vcpus.clear());
        assert!(matches!(vcpus, Err(MachineError::Other(_))));
        let vcpus = without(|state| state.kvm.vcpus.extend(state.kvm.vcpus.clone()));
        assert!(matches!(vcpus, Err(MachineError::Other(_))));
    }

    #[test]
    fn what_only_the_host_knows_makes_no_other_machine() {
        let disk = |id: &str, name: &str, read_only| {
            let mut spec = spec();
            let kind = DeviceKind::Block(BlockSpec {
                id: id.into(),
                read_only,
                queues: 1,
                ..BlockSpec::default()
            });
            let name = name.into();
            spec.devices.push(DeviceSpec { name, kind });
            spec.shape()
        };
        assert_eq!(disk("a", "disk0", true), disk("b", "scratch", true));
        assert_ne!(disk("a", "disk0", true), disk("a", "disk0", false));
    }
}
