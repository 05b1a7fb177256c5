//! What is read of kernels and initial RAM disks, and what is written for them.

use arbitrary::Arbitrary;
use mayfly_boot::{Boot, Initrd, Kernel, MmioDevice, Protocol, finish, initrd, kernel, payload};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const RAM: u64 = 32 << 20;

fn memory(size: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size as usize)]).unwrap()
}

/// A file as a kernel, in all ways to enter it.
pub fn load_kernel(bytes: &[u8]) {
    let mut file = crate::file(bytes);
    for want in [None, Some(Protocol::Linux64), Some(Protocol::Pvh)] {
        let memory = memory(RAM);
        let Ok(kernel) = kernel::load(&memory, &mut file, want) else {
            continue;
        };
        assert!(
            kernel.start <= kernel.end && kernel.end <= RAM,
            "{kernel:?}"
        );
        assert!(
            (kernel.start..kernel.end).contains(&kernel.entry),
            "{kernel:?}"
        );
        assert!(want.is_none_or(|want| want == kernel.protocol));
        let boot = Boot {
            cmdline: "quiet",
            initrd: None,
            cpus: 1,
            virtio: &[],
            watchdog: false,
            ram_size: RAM,
        };
        let entered = finish(&memory, &kernel, &boot);
        assert!(entered.is_err() || entered.unwrap().rip == kernel.entry);
    }
}

/// A file as an initial RAM disk.
pub fn load_initrd(bytes: &[u8]) {
    let mut file = crate::file(bytes);
    let kernel = 0x20_0000..0x40_0000;
    let loaded = initrd::load(&memory(RAM), &mut file, kernel.clone());
    if let Ok(Initrd { addr, size }) = loaded {
        assert_eq!(size, bytes.len() as u64);
        assert!(addr + size <= RAM && (addr >= kernel.end || addr + size <= kernel.start));
    }
}

/// A file as a bzImage that an ELF kernel is in.
pub fn extract(bytes: &[u8]) {
    if let Ok(vmlinux) = payload::extract_vmlinux(bytes) {
        assert!(vmlinux.starts_with(b"\x7fELF"));
    }
}

/// A machine to be described.
#[derive(Arbitrary, Debug)]
pub struct Machine {
    cmdline: String,
    initrd: Option<(u64, u64)>,
    cpus: u8,
    devices: Vec<(u64, u32)>,
    watchdog: bool,
    pvh: bool,
    ram_pages: u16,
}

/// Writes the tables of a machine.
pub fn describe(machine: Machine) {
    let ram_size = u64::from(machine.ram_pages).max(1) << 12;
    let devices = machine.devices.iter();
    let devices: Vec<_> = devices
        .map(|&(addr, irq)| MmioDevice { addr, irq })
        .collect();
    let kernel = Kernel {
        entry: 0x100_0000,
        protocol: if machine.pvh {
            Protocol::Pvh
        } else {
            Protocol::Linux64
        },
        start: 0,
        end: 0x200_0000,
        header: None,
    };
    let boot = Boot {
        cmdline: &machine.cmdline,
        initrd: machine.initrd.map(|(addr, size)| Initrd { addr, size }),
        cpus: machine.cpus,
        virtio: &devices,
        watchdog: machine.watchdog,
        ram_size,
    };
    let _ = finish(&memory(ram_size), &kernel, &boot);
}
