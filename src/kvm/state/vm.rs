//! The state of the VM beside its vCPUs: interrupt controllers, timer and clock.

#![allow(unsafe_code, reason = "KVM's interrupt controllers are a union")]

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_ioapic_state, kvm_irqchip, kvm_pic_state,
    kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::error::{StateError, VERSION, check_version};
use super::registers::{IoapicState, PicState, PitChannel, PitState};
use super::tsc;
use crate::kvm::error::{KvmError, doing};

const CHIPS: [u32; 2] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];
/// The modes of a timer's channel (Intel 8254, control word) have three bits; one that was
/// never set up has another.
const PIT_MODES: u8 = 8;
const PIT_MODE_NONE: u8 = 0xff;
/// A channel counts from 16 bits; KVM writes 65,536 for 0.
const PIT_COUNT_MAX: u32 = 0x1_0000;

/// What KVM holds of a VM beside its vCPUs and its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// [`VERSION`], when it was written.
    pub version: u16,
    /// The two interrupt controllers of a PC.
    pub pics: [PicState; 2],
    /// The I/O APIC.
    pub ioapic: IoapicState,
    /// The timer.
    pub pit: PitState,
    /// The clock.
    pub clock: ClockState,
}

/// The moment when a VM was saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// The guest's clock (kvmclock), in nanoseconds. It stands still until the restore.
    pub guest: u64,
    /// The host's time in nanoseconds since 1970, where KVM tells it (Linux 5.16).
    pub realtime: Option<u64>,
    /// The host's time stamp counter: see [`TscAnchor`](super::TscAnchor).
    pub host_tsc: u64,
}

/// Reads the state of a VM whose vCPUs are at rest.
pub(crate) fn save(fd: &VmFd) -> Result<VmState, StateError> {
    let mut pics = [PicState::default(); CHIPS.len()];
    for (pic, chip) in pics.iter_mut().zip(CHIPS) {
        let read = chip_state(fd, chip)?;
        // SAFETY: of such a chip KVM writes this member.
        *pic = unsafe { read.chip.pic }.into();
    }
    let read = chip_state(fd, KVM_IRQCHIP_IOAPIC)?;
    // SAFETY: of such a chip KVM writes this member.
    let ioapic = unsafe { read.chip.ioapic };
    let pit = fd.get_pit2().map_err(doing("reading the timer"))?;
    let clock = fd.get_clock().map_err(doing("reading the clock"))?;
    let flagged = |flag, value| (clock.flags & flag != 0).then_some(value);
    Ok(VmState {
        version: VERSION,
        pics,
        ioapic: IoapicState {
            base_address: ioapic.base_address,
            ioregsel: ioapic.ioregsel,
            id: ioapic.id,
            irr: ioapic.irr,
            // SAFETY: the union is a number, and its parts.
            redirection: ioapic.redirtbl.map(|entry| unsafe { entry.bits }),
        },
        pit: PitState {
            channels: pit.channels.map(PitChannel::from),
            flags: pit.flags,
        },
        clock: ClockState {
            guest: clock.clock,
            realtime: flagged(KVM_CLOCK_REALTIME, clock.realtime),
            host_tsc: flagged(KVM_CLOCK_HOST_TSC, clock.host_tsc).unwrap_or_else(tsc::host_tsc),
        },
    })
}

/// Puts a VM into a state, whose vCPUs are in theirs already.
pub(crate) fn restore(fd: &VmFd, state: &VmState) -> Result<(), StateError> {
    state.check()?;
    for (pic, chip_id) in state.pics.iter().zip(CHIPS) {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        chip.chip.pic = kvm_pic_state::from(*pic);
        fd.set_irqchip(&chip)
            .map_err(doing("setting an interrupt controller"))?;
    }
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    chip.chip.ioapic = ioapic(&state.ioapic);
    fd.set_irqchip(&chip)
        .map_err(doing("setting the I/O APIC"))?;
    fd.set_pit2(&kvm_pit_state2 {
        channels: state.pit.channels.map(kvm_pit_channel_state::from),
        flags: state.pit.flags,
        ..Default::default()
    })
    .map_err(doing("setting the timer"))?;
    // Without flags, so the guest's clock goes on where it stood.
    fd.set_clock(&kvm_clock_data {
        clock: state.clock.guest,
        ..Default::default()
    })
    .map_err(doing("setting the clock"))?;
    Ok(())
}

impl VmState {
    /// Refuses what [`save`] does not make.
    fn check(&self) -> Result<(), StateError> {
        check_version(self.version)?;
        let possible = |channel: &PitChannel| {
            (channel.mode < PIT_MODES || channel.mode == PIT_MODE_NONE)
                && channel.count <= PIT_COUNT_MAX
        };
        match self.pit.channels.iter().all(possible) {
            true => Ok(()),
            false => Err(StateError::Malformed("its timer does what no timer does")),
        }
    }
}

fn chip_state(fd: &VmFd, chip_id: u32) -> Result<kvm_irqchip, KvmError> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    fd.get_irqchip(&mut chip)
        .map_err(doing("reading an interrupt controller"))?;
    Ok(chip)
}

fn ioapic(state: &IoapicState) -> kvm_ioapic_state {
    let mut ioapic = kvm_ioapic_state {
        base_address: state.base_address,
        ioregsel: state.ioregsel,
        id: state.id,
        irr: state.irr,
        ..Default::default()
    };
    for (to, from) in ioapic.redirtbl.iter_mut().zip(state.redirection) {
        to.bits = from;
    }
    ioapic
}
