//! ELF kernels whose segments are as long as what is in them.
//!
//! Linux writes its `.bss` and what is behind it into its ELF file, as zeroes. They need not
//! be read for each boot: memory behind `p_filesz` is zero without that (System V gABI,
//! chapter 5).

use std::mem::offset_of;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use vm_memory::ByteValued;

const FILE_SIZE: usize = offset_of!(Elf64_Phdr, p_filesz);

/// Takes the zeroes at a segment's end out of the segment, for each that is loaded. The file
/// has the same length and content but for that. What is no ELF file stays as it is.
pub fn trim_segments(vmlinux: &mut [u8]) {
    let Some(header) = read::<Elf64_Ehdr>(vmlinux, 0) else {
        return;
    };
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return;
    }
    let Ok(start) = usize::try_from(header.e_phoff) else {
        return;
    };
    for index in 0..usize::from(header.e_phnum) {
        let Some(at) = start.checked_add(index * size_of::<Elf64_Phdr>()) else {
            return;
        };
        let Some(segment) = read::<Elf64_Phdr>(vmlinux, at) else {
            return;
        };
        if let (PT_LOAD, Some(len)) = (segment.p_type, used(vmlinux, &segment))
            && let Some(place) = vmlinux.get_mut(at + FILE_SIZE..at + FILE_SIZE + size_of::<u64>())
        {
            place.copy_from_slice(&len.to_le_bytes());
        }
    }
}

/// The length of a segment in the file without the zeroes at its end.
fn used(vmlinux: &[u8], segment: &Elf64_Phdr) -> Option<u64> {
    let start = usize::try_from(segment.p_offset).ok()?;
    let len = usize::try_from(segment.p_filesz).ok()?;
    let content = vmlinux.get(start..start.checked_add(len)?)?;
    let last = content.iter().rposition(|byte| *byte != 0);
    u64::try_from(last.map_or(0, |last| last + 1)).ok()
}

fn read<T: ByteValued + Default>(bytes: &[u8], at: usize) -> Option<T> {
    let mut value = T::default();
    let from = bytes.get(at..at.checked_add(size_of::<T>())?)?;
    value.as_mut_slice().copy_from_slice(from);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::{file_of, memory};
    use crate::kernel::{self};
    use linux_loader::elf::PT_NOTE;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    const START: u64 = 0x20_0000;
    const OFFSET: usize = 0x1000;

    fn segment(kind: u32, len: u64) -> Elf64_Phdr {
        Elf64_Phdr {
            p_type: kind,
            p_offset: OFFSET as u64,
            p_paddr: START,
            p_filesz: len,
            p_memsz: 0x8000,
            ..Default::default()
        }
    }

    /// A kernel whose first segment ends with zeroes.
    fn image() -> Vec<u8> {
        let mut header = Elf64_Ehdr {
            e_type: 2,
            e_machine: 62,
            e_entry: START,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: 2,
            ..Default::default()
        };
        header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let mut bytes = header.as_slice().to_vec();
        bytes.extend(segment(PT_LOAD, 0x4000).as_slice());
        bytes.extend(segment(PT_NOTE, 0).as_slice());
        bytes.resize(OFFSET, 0);
        bytes.extend([7; 0x123]);
        bytes.resize(OFFSET + 0x4000, 0);
        bytes.extend(b"sections");
        bytes
    }

    fn loaded(image: &[u8]) -> Vec<u8> {
        let mem = memory(8 << 20);
        kernel::load(&mem, &mut file_of(image), None).unwrap();
        let mut content = vec![0; 0x8000];
        mem.read_slice(&mut content, GuestAddress(START)).unwrap();
        content
    }

    #[test]
    fn a_kernel_is_the_same_in_memory_and_shorter_to_read() {
        let whole = image();
        let mut trimmed = whole.clone();
        trim_segments(&mut trimmed);
        let first: Elf64_Phdr = read(&trimmed, 64).unwrap();
        assert_eq!((first.p_filesz, first.p_memsz), (0x123, 0x8000));
        assert_eq!(trimmed.len(), whole.len());
        let different = trimmed.iter().zip(&whole).filter(|(a, b)| a != b);
        assert!(different.count() <= size_of::<u64>());
        assert!(loaded(&trimmed) == loaded(&whole));
        let again = trimmed.clone();
        trim_segments(&mut trimmed);
        assert!(trimmed == again);
    }

    proptest! {
        #[test]
        fn nothing_in_a_file_is_trusted(at in 0usize..256, byte: u8, len in 0usize..0x5100) {
            let mut damaged = image();
            damaged[at] = byte;
            damaged.truncate(len);
            let before = damaged.len();
            trim_segments(&mut damaged);
            prop_assert_eq!(damaged.len(), before);
        }
    }
}
