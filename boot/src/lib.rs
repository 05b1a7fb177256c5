//! What must be in guest memory before a guest's first instruction.
//!
//! The recipe is [`kernel::load`], then [`initrd::load`], then [`finish`],
//! which returns the registers to start the first vCPU with. The crate knows
//! neither KVM nor any device; where everything lies is drawn in [`layout`].

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::string_slice))]
#![cfg_attr(
    not(test),
    deny(
        clippy::cast_lossless,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )
)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod acpi;
mod acpi_table;
pub mod bzimage;
pub mod cmdline;
pub mod cpu;
mod decoders;
pub mod elf;
pub mod initramfs;
pub mod initrd;
pub mod kernel;
pub mod layout;
mod loaded;
mod machine;
pub mod module;
pub mod payload;
pub mod pvh;
mod trim;
mod wdat;
pub mod zero_page;

use vm_memory::GuestMemoryBackend;

pub use acpi::MmioDevice;
pub use cpu::EntryState;
pub use initrd::Initrd;
pub use kernel::{Kernel, KernelError, Protocol};
pub use machine::{Boot, BootError};
pub use trim::trim_segments;

/// Writes everything but the kernel and the initial RAM disk, and returns the
/// state in which the first vCPU enters the guest.
pub fn finish<M: GuestMemoryBackend>(
    mem: &M,
    kernel: &Kernel,
    boot: &Boot,
) -> Result<EntryState, BootError> {
    cmdline::write(mem, boot.cmdline)?;
    cpu::write_reset_vector(mem)?;
    let rsdp = acpi::write_tables(mem, boot.cpus, boot.virtio, boot.watchdog)?;
    match kernel.protocol {
        Protocol::Linux64 => {
            zero_page::write(mem, kernel, boot, rsdp)?;
            cpu::write_page_tables(mem)?;
        }
        Protocol::Pvh => pvh::write(mem, boot, rsdp)?,
    }
    cpu::write_entry_state(mem, kernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    const RAM: u64 = 64 << 20;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
    }

    fn kernel(protocol: Protocol) -> Kernel {
        Kernel {
            entry: 0x100_0000,
            protocol,
            start: 0,
            end: 0x200_0000,
            header: None,
        }
    }

    fn boot(initrd: Option<Initrd>) -> Boot<'static> {
        Boot {
            cmdline: "console=ttyS0",
            initrd,
            cpus: 1,
            virtio: &[],
            watchdog: false,
            ram_size: RAM,
        }
    }

    #[test]
    fn linux_enters_long_mode_with_the_zero_page_in_rsi() {
        let mem = memory();
        let state = finish(&mem, &kernel(Protocol::Linux64), &boot(None)).unwrap();
        assert_eq!((state.rip, state.rsi), (0x100_0000, layout::ZERO_PAGE));
        assert_eq!(state.cr3, layout::PML4);
        assert!(state.code.l && !state.code.db);
        let mut line = [0u8; 14];
        mem.read_slice(&mut line, GuestAddress(layout::CMDLINE.into()))
            .unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
    }

    #[test]
    fn pvh_enters_flat_protected_mode_with_start_info_in_rbx() {
        let state = finish(&memory(), &kernel(Protocol::Pvh), &boot(None)).unwrap();
        assert_eq!(state.rbx, layout::PVH_START_INFO);
        assert_eq!((state.cr0 & 0x8000_0001, state.efer, state.cr4), (1, 0, 0));
        assert!(!state.code.l && state.code.db);
    }

    #[test]
    fn tiny_memory_is_an_error_not_a_panic() {
        let mem: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        for protocol in [Protocol::Linux64, Protocol::Pvh] {
            assert!(finish(&mem, &kernel(protocol), &boot(None)).is_err());
        }
    }
}
