//! Saving a machine at its snapshot point, where it ends.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use mayfly_devices::bus::lock;
use mayfly_devices::serial::Serial;
use std::sync::Mutex;

use super::devices::AttachedDevice;
use super::platform::PlatformHandle;
use super::vcpus::VcpuControl;
use crate::failure::{Failure, OrFail};
use crate::kvm::memory::GuestMemory;
use crate::kvm::state::StateScope;
use crate::kvm::vm::Vm;
use crate::snapshot::kvm::KvmState;
use crate::snapshot::machine::{DeviceStates, MachineState};
use crate::snapshot::memory::{self, Pagemap};
use crate::spec::MachineSpec;

/// Where a machine is saved to, and what that takes of the host.
pub struct Saver {
    state: File,
    memory: File,
    pagemap: Pagemap,
    scope: Arc<StateScope>,
}

/// The parts of a machine that are saved.
pub struct Running<'a> {
    /// Its specification.
    pub spec: &'a MachineSpec,
    /// The virtual machine.
    pub vm: &'a Vm,
    /// Its vCPUs, which are about to stop.
    pub vcpus: &'a VcpuControl,
    /// Its memory.
    pub memory: &'a GuestMemory,
    /// The virtio devices.
    pub devices: &'a [AttachedDevice],
    /// The other devices.
    pub platform: &'a PlatformHandle,
    /// The serial port.
    pub serial: &'a Mutex<Serial>,
}

impl Saver {
    /// For empty files. To be made before the sandbox is closed.
    pub fn new(state: File, memory: File, kvm: &Kvm) -> Result<Self, Failure> {
        Ok(Saver {
            state,
            memory,
            pagemap: Pagemap::open().or_host("/proc/self/pagemap")?,
            scope: Arc::new(StateScope::of(kvm).or_host("KVM")?),
        })
    }

    /// Saves a machine whose guest is at the snapshot point. It does not go on.
    pub fn save(&self, machine: &Running) -> Result<(), Failure> {
        if !machine.vcpus.pause() {
            return Err(Failure::host("a vCPU does not leave the guest"));
        }
        for device in machine.devices {
            let mut transport = lock(&device.transport);
            transport.quiesce();
            if transport.is_broken() {
                let name = &device.name;
                return Err(Failure::host(format!("{name}: its driver has to reset it")));
            }
        }
        let devices = machine.devices.iter().map(|device| {
            let state = lock(&device.transport).save();
            state.or_host(&device.name)
        });
        let devices = devices.collect::<Result<_, _>>()?;
        let vcpus = machine.vcpus.save(&self.scope)?;
        let vm = machine.vm.save().or_host("interrupt controllers")?;
        let state = MachineState {
            kvm: KvmState { vm, vcpus },
            devices: DeviceStates(devices),
            platform: machine.platform.save(machine.serial),
        };
        let state = state.to_bytes(machine.spec).or_internal("the state file")?;
        self.state
            .write_all_at(&state, 0)
            .or_host("writing the state file")?;
        memory::write(machine.memory, None, &self.pagemap, &self.memory)
            .map(drop)
            .or_host("guest memory")
    }
}
