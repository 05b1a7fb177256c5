//! Loading a kernel, of whichever format its first bytes say.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::GuestMemoryBackend;

use crate::loaded::reading;
pub use crate::loaded::{Kernel, KernelError, Protocol};
use crate::{bzimage, elf};

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Linux' `Documentation/arch/x86/boot.rst`: the setup header's magic.
const BZIMAGE_MAGIC: [u8; 4] = *b"HdrS";
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;

/// Loads the kernel in `file`, entered as `want` says or as suits it best.
pub fn load<M: GuestMemoryBackend>(
    mem: &M,
    file: &mut File,
    want: Option<Protocol>,
) -> Result<Kernel, KernelError> {
    let len = file.metadata().map_err(reading("size"))?.len();
    if magic_at(file, 0, len)? == Some(ELF_MAGIC) {
        elf::load(mem, file, len, want)
    } else if magic_at(file, BZIMAGE_MAGIC_OFFSET, len)? == Some(BZIMAGE_MAGIC) {
        bzimage::load(mem, file, len, want)
    } else {
        Err(KernelError::NotAKernel)
    }
}

fn magic_at(file: &File, offset: u64, len: u64) -> Result<Option<[u8; 4]>, KernelError> {
    let mut magic = [0; 4];
    if len < offset + magic.len() as u64 {
        return Ok(None);
    }
    file.read_exact_at(&mut magic, offset)
        .map_err(reading("magic"))?;
    Ok(Some(magic))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    /// A file with these bytes.
    pub(crate) fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    pub(crate) fn memory(size: usize) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap()
    }

    #[test]
    fn other_files_are_not_kernels() {
        for bytes in [&b""[..], b"\x7f", b"#!/bin/sh\n", &[0; 4096]] {
            let result = load(&memory(1 << 21), &mut file_of(bytes), None);
            assert!(matches!(result, Err(KernelError::NotAKernel)));
        }
    }
}
