//! The other recipe: a machine that goes on as one that was saved.
//!
//! First comes what may turn out not to fit this host, so that the machine can still boot
//! then: the state file, memory and KVM's part. The backends of devices are used up after.

use std::fs::File;
use std::io::Read;
use std::mem;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_ioctls::Kvm;
use mayfly_boot::layout;
use mayfly_devices::mailbox::Mailbox;
use mayfly_protocol::mailbox::Mail;
use rustix::rand::{GetRandomFlags, getrandom};

use super::build::{Machine, Parts, attach_serial, memory_flag};
use super::devices::{self, AttachedDevices, DeviceContext};
use super::events::{Notifier, event};
use super::platform;
use crate::failure::{Class, Failure, OrFail};
use crate::kvm::gate::Gate;
use crate::kvm::memory::{GuestMemory, MemoryError, exclude_from_dumps, memory_over, prefault};
use crate::kvm::state::{StateScope, TscAnchor};
use crate::kvm::vcpu::{Buses, Vcpu};
use crate::kvm::vm::Vm;
use crate::link::VmmFailure;
use crate::snapshot::machine::{DeviceStates, MachineState, PlatformState};
use crate::snapshot::mailbox;
use crate::spec::MachineSpec;
use crate::timing::Timeline;

/// The longest message for a guest, in bytes.
const MAIL_MAX: u64 = 1 << 20;

/// The files of a saved machine, and the message for its guest.
pub struct Saved {
    /// The state file.
    pub state: File,
    /// The memory file.
    pub memory: File,
    /// The message for the guest, as postcard has it.
    pub mail: File,
}

/// A machine whose memory, vCPUs and interrupt controllers are as they were saved.
pub struct Resumed {
    vm: Vm,
    vcpus: Vec<Vcpu>,
    memory: GuestMemory,
    devices: DeviceStates,
    platform: PlatformState,
    mail: PendingMail,
}

/// A message that the guest finds when it goes on.
pub struct PendingMail {
    address: u64,
    mail: Mail,
}

/// Makes what KVM has of the machine, or says why that cannot be. If it is the saved machine
/// that does not fit, or is damaged, the failure's class is that of what cannot be.
pub fn resume(
    spec: &MachineSpec,
    kvm: &Kvm,
    saved: Saved,
    timeline: &mut Timeline,
) -> Result<Resumed, Failure> {
    if let Some(why) = spec.why_not_saved() {
        return Err(Failure::config(format!("it cannot be restored: {why}")));
    }
    let state = MachineState::read(&saved.state, spec);
    let state = match state {
        Err(error) if error.is_final() => Err(error).or_config("the state file")?,
        state => state.or_host("the state file")?,
    };
    let MachineState {
        kvm: kvm_state,
        devices,
        platform,
    } = state;
    let memory = memory_over(&saved.memory, spec.memory.size);
    let memory = match memory {
        Err(error @ MemoryError::Length { .. }) => Err(error).or_config("the memory file")?,
        memory => memory.or_host(memory_flag(spec))?,
    };
    let mail = PendingMail::read(saved.mail, &memory, &platform)?;
    if spec.memory.prefault {
        prefault(&memory).or_host(memory_flag(spec))?;
    }
    timeline.memory_mapped = timeline.now();

    let mut vm = Vm::new(kvm).or_host("--cpus")?;
    vm.add_memory(&memory);
    vm.set_memory().or_host(memory_flag(spec))?;
    timeline.kvm_ready = timeline.now();
    exclude_from_dumps(&memory).or_host(memory_flag(spec))?;
    let scope = StateScope::of(kvm).or_host("KVM")?;
    let anchor = TscAnchor::new(kvm_state.vm.clock.host_tsc);
    let mut vcpus = Vec::new();
    for (index, state) in (0..spec.cpus).zip(&kvm_state.vcpus) {
        let vcpu = Vcpu::new(&vm, index, spec.cpus, spec.nested).or_host("a vCPU")?;
        vcpu.restore(state, &scope, anchor)
            .or_config(format_args!("vCPU {index}"))?;
        vcpus.push(vcpu);
    }
    vm.restore(&kvm_state.vm)
        .or_config("interrupt controllers")?;
    Ok(Resumed {
        vm,
        vcpus,
        memory,
        devices,
        platform,
        mail,
    })
}

/// Gives the machine its devices.
pub fn attach(
    spec: &MachineSpec,
    mut parts: Parts,
    resumed: Resumed,
) -> Result<(Machine, PendingMail), VmmFailure> {
    let Resumed {
        mut vm,
        vcpus,
        memory,
        devices,
        platform: state,
        mail,
    } = resumed;
    let events = Mailbox::default();
    let wake = event()?;
    let notifier = Notifier::new(&events, &wake)?;
    let mut buses = Buses::default();
    let (serial, serial_event) = attach_serial(&vm, &mut buses, state.serial.clone())?;
    let gate = Arc::new(Gate::new(spec.cpus.into()));
    let platform_context = platform::PlatformContext {
        vm: &vm,
        memory: &memory,
        notifier: &notifier,
        gate: &gate,
        saves: false,
    };
    let watchdog = spec.watchdog.is_some();
    let platform = platform::attach(&platform_context, &mut buses, watchdog, &state)?;
    let context = DeviceContext {
        vm: &vm,
        memory: &memory,
        broker: &parts.broker,
        prepare: &parts.prepare,
        host: &parts.host,
    };
    let backends = mem::take(&mut parts.backends);
    let line = (serial.clone(), serial_event);
    let attached = devices::attach(spec, backends, devices.0, line, &context, &mut buses)?;
    let AttachedDevices {
        devices,
        connections,
        balloon,
        registers,
    } = attached;
    vm.add_registers(registers);
    vm.set_registers().or_host("registers")?;
    platform.renew_generation().or_host("VM generation ID")?;
    let machine = Machine {
        vm,
        vcpus,
        buses,
        devices: devices.into(),
        connections,
        balloon,
        platform,
        notifier,
        events,
        wake,
        gate,
        memory,
        serial,
    };
    Ok((machine, mail))
}

impl PendingMail {
    /// Reads it, and sees to it that there is room for it.
    fn read(file: File, memory: &GuestMemory, platform: &PlatformState) -> Result<Self, Failure> {
        const WHAT: &str = "the message for it";
        let mut bytes = Vec::new();
        file.take(MAIL_MAX).read_to_end(&mut bytes).or_host(WHAT)?;
        let mut mail = Mail::from_bytes(&bytes).or_internal(WHAT)?;
        // As long as the time can be.
        mail.realtime = u64::MAX;
        let len = mail.to_bytes().or_internal(WHAT)?.len();
        let address = platform.snapshot_port.mailbox;
        let room = mailbox::room(memory, address).or_config(WHAT)?;
        match len <= room {
            true => Ok(PendingMail { address, mail }),
            false => Err(Failure::host(format!(
                "{WHAT} is larger than the guest's mailbox"
            ))),
        }
    }

    /// Puts it into the guest's mailbox, with the time and random bytes of now.
    pub fn deliver(mut self, memory: &GuestMemory) -> Result<(), Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.or_host("the host's clock")?;
        self.mail.realtime = u64::try_from(now.as_nanos()).or_internal("the host's clock")?;
        fill(&mut self.mail.generation)?;
        fill(self.mail.entropy.as_flattened_mut())?;
        mailbox::deliver(memory, self.address, Some(&self.mail)).or_internal("the guest's mailbox")
    }
}

/// Fills a few bytes with random ones.
fn fill(bytes: &mut [u8]) -> Result<(), Failure> {
    let read = getrandom(&mut *bytes, GetRandomFlags::empty()).or_host("random numbers")?;
    match read == bytes.len() {
        true => Ok(()),
        false => Err(Failure::new(Class::Host, "the host has no random numbers")),
    }
}

// The mailbox lies in memory alone.
const _: () = assert!(layout::SNAPSHOT_PORT_LEN == 2);
