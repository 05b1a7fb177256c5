//! The description of a machine for its guest's firmware tables, and the errors of writing it.

use crate::acpi::{AcpiError, MmioDevice};
use crate::cmdline::CmdlineError;
use crate::initrd::Initrd;

/// The machine as the guest's firmware tables describe it.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a> {
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The initial RAM disk, when one is loaded.
    pub initrd: Option<Initrd>,
    /// How many vCPUs; their local APIC identifiers are 0, 1, 2…
    pub cpus: u8,
    /// The virtio-mmio devices, in the order of their names in the guest.
    pub virtio: &'a [MmioDevice],
    /// There is a watchdog.
    pub watchdog: bool,
    /// Bytes of RAM, laid out as [`ram_regions`](crate::layout::ram_regions) says.
    pub ram_size: u64,
}

/// Why the guest's boot structures could not be written.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The command line is not acceptable.
    #[error("command line")]
    Cmdline(#[from] CmdlineError),
    /// The ACPI tables could not be made.
    #[error("ACPI tables")]
    Acpi(#[from] AcpiError),
    /// The kernel cannot reach its initial RAM disk.
    #[error(
        "the initial RAM disk ends at {end:#x}, above the kernel's limit {max:#x}; give the VM less memory or use a newer kernel"
    )]
    InitrdTooHigh {
        /// The disk's last byte.
        end: u64,
        /// The highest address that the kernel accepts.
        max: u64,
    },
    /// A structure does not fit in guest memory.
    #[error("writing {what} to guest memory")]
    Memory {
        /// The structure.
        what: &'static str,
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Names what was being written when guest memory refused it.
pub(crate) fn writing(what: &'static str) -> impl FnOnce(vm_memory::GuestMemoryError) -> BootError {
    move |source| BootError::Memory { what, source }
}
