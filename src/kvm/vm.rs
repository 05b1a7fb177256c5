//! The virtual machine: memory slots, interrupt controllers, notifications.

#![allow(
    unsafe_code,
    reason = "KVM is given guest memory, and comes as a descriptor"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY,
    kvm_irq_level, kvm_irq_level__bindgen_ty_1, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use mayfly_boot::layout;
use mayfly_devices::virtio::interrupt::InterruptLine;
use mayfly_devices::virtio::registers::RegisterPage;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::error::{KvmError, doing};
use super::memory::GuestMemory;
use super::state::{self, StateError, VmState};

/// Where Intel's KVM keeps pages of its own: in the hole, below the BIOS.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;
const DEVICE: &str = "/dev/kvm";

/// What mayfly cannot do without.
const REQUIRED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "interrupt controllers"),
    (Cap::Pit2, "a timer"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "CPUID"),
];

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no device.
    #[error(
        "{DEVICE} does not exist; load the module kvm_intel or kvm_amd, and enable virtualization in the firmware"
    )]
    Missing,
    /// This user may not use it.
    #[error(
        "no permission on {DEVICE}; join its group (sudo usermod -aG kvm $USER, then log in again)"
    )]
    Permission,
    /// It does not open.
    #[error("opening {DEVICE}")]
    Open(#[source] io::Error),
    /// It is another interface.
    #[error("{DEVICE} speaks version {0} of its interface instead of {KVM_API_VERSION}")]
    Version(i32),
    /// It is too old.
    #[error("{DEVICE} lacks {0}; use a newer kernel")]
    Lacks(&'static str),
}

/// KVM as another process opened it.
pub fn inherited(kvm: OwnedFd) -> Kvm {
    // SAFETY: it is an open descriptor that nothing else owns.
    unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) }
}

/// Another descriptor of KVM, for another process.
pub fn duplicate(kvm: &Kvm) -> io::Result<OwnedFd> {
    // SAFETY: it is open as long as `kvm` lives.
    unsafe { BorrowedFd::borrow_raw(kvm.as_raw_fd()) }.try_clone_to_owned()
}

/// Opens KVM and checks that it can do what is needed.
pub fn open() -> Result<Kvm, OpenError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => OpenError::Missing,
        libc::EACCES | libc::EPERM => OpenError::Permission,
        _ => OpenError::Open(error.into()),
    })?;
    match kvm.get_api_version() {
        version if u32::try_from(version) == Ok(KVM_API_VERSION) => {}
        version => return Err(OpenError::Version(version)),
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(OpenError::Lacks(name)),
        None => Ok(kvm),
    }
}

/// One of the guest's interrupts.
pub struct IrqLine {
    vm: OwnedFd,
    irq: u32,
    /// An irqfd: for the I/O APIC, a thread of the kernel's takes it up.
    soon: EventFd,
}

impl IrqLine {
    fn set(&self, level: u32) {
        let line = kvm_irq_level {
            __bindgen_anon_1: kvm_irq_level__bindgen_ty_1 { irq: self.irq },
            level,
        };
        // SAFETY: an open descriptor of a VM, and a live structure, which is read.
        if unsafe { ioctl_with_ref(&self.vm, KVM_IRQ_LINE, &line) } != 0 {
            log::warn!(
                "setting interrupt {}: {}",
                self.irq,
                io::Error::last_os_error()
            );
        }
    }
}

impl InterruptLine for IrqLine {
    fn pulse(&self) {
        self.set(1);
        self.set(0);
    }

    fn pulse_soon(&self) {
        // Only refuses when it is signalled already.
        let _ = self.soon.write(1);
    }
}

/// Linux' `kvm.h`.
const KVM_IRQ_LINE: libc::c_ulong = 0x4008_ae61;

/// A virtual machine without vCPUs.
pub struct Vm {
    pub(super) fd: VmFd,
    // Behind `fd`, so that it is unmapped only when the machine is gone.
    memory: Option<GuestMemory>,
    /// Registers that the guest reads by itself, if KVM can let it.
    shown: Vec<(Arc<RegisterPage>, u64)>,
    read_only_memory: bool,
    /// What KVM lets CPUID say.
    pub supported_cpuid: CpuId,
    /// KVM's local APICs have the TSC-deadline mode.
    pub tsc_deadline: bool,
}

impl Vm {
    /// A machine with interrupt controllers and nothing else.
    pub fn new(kvm: &Kvm) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(doing("creating a VM"))?;
        // Refused by those that do not need it.
        let _ = fd.set_identity_map_address(IDENTITY_MAP);
        let _ = fd.set_tss_address(TSS);
        fd.create_irq_chip()
            .map_err(doing("creating interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(doing("creating a timer"))?;
        let supported_cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(doing("asking for CPUID"))?;
        Ok(Vm {
            fd,
            memory: None,
            shown: Vec::new(),
            read_only_memory: kvm.check_extension(Cap::ReadonlyMem),
            supported_cpuid,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }

    /// Memory that is to be the guest's, once.
    pub fn add_memory(&mut self, memory: &GuestMemory) {
        self.memory = Some(memory.clone());
    }

    /// Transports' registers that the guest is to read by itself, each at its address; what it
    /// writes there is an exit as ever. Those of devices that hear of reads are left out, and
    /// all of them where KVM cannot do it.
    pub fn add_registers(&mut self, registers: Vec<(Arc<RegisterPage>, u64)>) {
        if self.read_only_memory {
            self.shown.extend(registers);
        }
    }

    /// Gives the guest its memory. KVM waits some milliseconds for each piece, with nothing to
    /// compute: so the caller may have other things done meanwhile.
    pub fn set_memory(&self) -> Result<(), KvmError> {
        let memory = self.memory.iter().flat_map(|memory| memory.iter());
        let memory = memory.map(|region| kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        });
        self.set(0, memory.collect())
    }

    /// Gives the guest the registers that were added, behind its memory. Those that lie in a
    /// row are one piece.
    pub fn set_registers(&self) -> Result<(), KvmError> {
        let memory = self.memory.iter().flat_map(|memory| memory.iter());
        self.set(memory.count(), rows(&self.shown))
    }

    /// Gives the guest pieces of memory, whose slots begin at a number.
    fn set(&self, first: usize, pieces: Vec<kvm_userspace_memory_region>) -> Result<(), KvmError> {
        for (slot, piece) in (first..).zip(pieces) {
            let slot = u32::try_from(slot).unwrap_or(u32::MAX);
            let description = kvm_userspace_memory_region { slot, ..piece };
            // SAFETY: a mapping, or pages, of that size, which this keeps. Guest memory is only
            // ever accessed as such, and the guest cannot write to the pages.
            unsafe { self.fd.set_user_memory_region(description) }
                .map_err(doing("giving the guest memory"))?;
        }
        Ok(())
    }

    /// A new vCPU.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(index.into())
            .map_err(doing("creating a vCPU"))
    }

    /// What KVM holds of this VM beside its vCPUs, which are at rest.
    pub fn save(&self) -> Result<VmState, StateError> {
        state::vm::save(&self.fd)
    }

    /// Makes this VM go on as another was saved, after all its vCPUs were restored.
    pub fn restore(&self, state: &VmState) -> Result<(), StateError> {
        state::vm::restore(&self.fd, state)
    }

    /// Interrupts the guest whenever `event` is signalled.
    pub fn connect_interrupt(&self, event: &EventFd, irq: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(event, irq)
            .map_err(doing("connecting an interrupt"))
    }

    /// An interrupt of the guest's.
    pub fn interrupt_line(&self, irq: u32) -> Result<IrqLine, KvmError> {
        let failed = |error: io::Error| {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            doing("making an interrupt")(kvm_ioctls::Error::new(errno))
        };
        // SAFETY: the descriptor stays open while `fd` lives.
        let vm = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        let vm = vm.try_clone_to_owned().map_err(failed)?;
        let soon = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        self.connect_interrupt(&soon, irq)?;
        Ok(IrqLine { vm, irq, soon })
    }

    /// Signals `event` when the guest writes `value` to a 32-bit register.
    pub fn connect_notification(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(doing("connecting a notification"))
    }
}

// The pages of KVM's own must lie where no device and no RAM is.
const _: () =
    assert!(IDENTITY_MAP > layout::APIC as u64 && TSS as u64 + 0x3000 < layout::MMIO_HOLE_END);

/// Pages of registers that lie in a row both here and in the guest, as one piece each.
fn rows(registers: &[(Arc<RegisterPage>, u64)]) -> Vec<kvm_userspace_memory_region> {
    const PAGE: u64 = layout::VIRTIO_MMIO_SIZE as u64;
    // What lies behind a page is not the guest's to read.
    const _: () = assert!(layout::VIRTIO_MMIO_SIZE as usize == RegisterPage::SIZE);
    let mut rows: Vec<kvm_userspace_memory_region> = Vec::new();
    for (page, address) in registers {
        let Some(start) = page.address() else {
            continue;
        };
        match rows.last_mut() {
            Some(row)
                if row.guest_phys_addr + row.memory_size == *address
                    && row.userspace_addr + row.memory_size == start as u64 =>
            {
                row.memory_size += PAGE;
            }
            _ => rows.push(kvm_userspace_memory_region {
                slot: 0,
                guest_phys_addr: *address,
                memory_size: PAGE,
                userspace_addr: start as u64,
                flags: KVM_MEM_READONLY,
            }),
        }
    }
    rows
}
