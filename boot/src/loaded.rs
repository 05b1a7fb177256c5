//! What kernels of all formats have in common: how they are entered, and where they lie.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use linux_loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// The protocol by which a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux' 64-bit boot protocol: long mode, `boot_params` in RSI.
    Linux64,
    /// Xen's PVH: flat 32-bit protected mode, `hvm_start_info` in EBX.
    Pvh,
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// The physical address of the first instruction.
    pub entry: u64,
    /// The protocol by which it is entered.
    pub protocol: Protocol,
    /// The start of the memory that the kernel needs for itself.
    pub start: u64,
    /// The end of it.
    pub end: u64,
    /// The setup header that a bzImage carries.
    pub header: Option<setup_header>,
}

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file is of no format that can be booted.
    #[error("not a kernel: expected an x86-64 ELF (vmlinux) or a bzImage")]
    NotAKernel,
    /// The file ends too early.
    #[error("the kernel file is truncated: {what} needs {need} bytes, the file has {have}")]
    Truncated {
        /// The part that does not fit in the file.
        what: &'static str,
        /// The bytes that the file would have to have.
        need: u64,
        /// The bytes that it has.
        have: u64,
    },
    /// The ELF file is for another machine, or of another kind.
    #[error("the ELF kernel is not supported: {0}")]
    UnsupportedElf(&'static str),
    /// The ELF file contradicts itself.
    #[error("the ELF kernel is malformed: {0}")]
    MalformedElf(&'static str),
    /// PVH was asked for and the kernel has no such entry.
    #[error(
        "the kernel has no PVH entry point; use a vmlinux built with CONFIG_PVH=y, or the linux64 protocol"
    )]
    NoPvhEntry,
    /// The bzImage is too old or of another kind.
    #[error("the bzImage is not supported: {0}")]
    UnsupportedBzImage(&'static str),
    /// The kernel does not fit in RAM.
    #[error(
        "the kernel needs guest memory from {start:#x} to {end:#x}, which the VM does not have; give it more memory"
    )]
    DoesNotFit {
        /// The first address.
        start: u64,
        /// The address behind the last.
        end: u64,
    },
    /// The entry point lies outside of what was loaded.
    #[error("the kernel's entry point {0:#x} lies outside of its segments")]
    EntryOutside(u64),
    /// The file could not be read.
    #[error("reading the kernel's {what}")]
    Read {
        /// The part that was being read.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Copying the file to guest memory failed.
    #[error("copying the kernel into guest memory at {addr:#x}")]
    Copy {
        /// The guest's address.
        addr: u64,
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

pub(crate) fn reading(what: &'static str) -> impl FnOnce(io::Error) -> KernelError {
    move |source| KernelError::Read { what, source }
}

/// The error of [`place`].
pub(crate) enum PlaceError {
    Seek(io::Error),
    Copy(vm_memory::GuestMemoryError),
}

/// Copies `len` bytes of the file to a guest address. It is not mapped there: a guest
/// writes to most pages of its kernel, so that few would stay shared, and each would cost
/// two faults in nested paging, where fresh memory has one for a huge page.
/// The caller has checked that the range is RAM.
pub(crate) fn place<M: GuestMemoryBackend>(
    mem: &M,
    file: &mut File,
    offset: u64,
    addr: u64,
    len: u64,
) -> Result<(), PlaceError> {
    let len = usize::try_from(len).map_err(|error| PlaceError::Seek(io::Error::other(error)))?;
    file.seek(SeekFrom::Start(offset))
        .map_err(PlaceError::Seek)?;
    mem.read_exact_volatile_from(GuestAddress(addr), file, len)
        .map_err(PlaceError::Copy)
}

pub(crate) fn place_kernel<M: GuestMemoryBackend>(
    mem: &M,
    file: &mut File,
    offset: u64,
    addr: u64,
    len: u64,
) -> Result<(), KernelError> {
    place(mem, file, offset, addr, len).map_err(|error| match error {
        PlaceError::Seek(source) => KernelError::Read {
            what: "contents",
            source,
        },
        PlaceError::Copy(source) => KernelError::Copy { addr, source },
    })
}

/// `[start, end)` lies in guest memory, without holes.
pub(crate) fn check_fits<M: GuestMemoryBackend>(
    mem: &M,
    start: u64,
    end: u64,
) -> Result<(), KernelError> {
    let fits = end
        .checked_sub(start)
        .and_then(|len| usize::try_from(len).ok())
        .is_some_and(|len| mem.check_range(GuestAddress(start), len));
    if fits {
        Ok(())
    } else {
        Err(KernelError::DoesNotFit { start, end })
    }
}
