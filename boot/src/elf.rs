//! ELF kernels: `vmlinux`, and anything with a PVH note.
//!
//! The file is foreign: every number in it is checked before it is used, and
//! the range that it claims lies inside of the file before it is read.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::{ByteValued, GuestMemoryBackend};

use crate::layout::HIMEM_START;
use crate::loaded::{Kernel, KernelError, Protocol, check_fits, place_kernel, reading};

/// `e_ident`, System V gABI chapter 4: class, byte order.
const EI_CLASS: usize = 4;
const EI_DATA: usize = 5;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;

/// Xen's `include/public/elfnote.h`: the 32-bit physical entry point.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const XEN_NOTE_NAME: &[u8] = b"Xen\0";
/// Linux' `MIN_KERNEL_ALIGN` on x86-64.
const LINUX_ALIGN: u64 = 2 << 20;
/// Where a kernel goes that does not fit where it was linked to.
const LOWEST: u64 = LINUX_ALIGN;
/// No kernel has more notes than this.
const NOTES_MAX: usize = 64 << 10;

pub(crate) fn load<M: GuestMemoryBackend>(
    mem: &M,
    file: &mut File,
    file_len: u64,
    want: Option<Protocol>,
) -> Result<Kernel, KernelError> {
    let header = read_header(file, file_len)?;
    let segments = read_segments(file, file_len, &header)?;

    // All is checked before anything is written.
    let mut start = u64::MAX;
    let mut end = 0;
    for segment in loadable(&segments) {
        end = end.max(check_segment(segment, file_len)?);
        start = start.min(segment.p_paddr);
    }
    if end == 0 {
        return Err(KernelError::MalformedElf("it has no loadable segment"));
    }
    let (mut protocol, mut entry) = choose_entry(file, file_len, &header, &segments, want)?;
    let mut shift = 0;
    if let Err(too_large) = check_fits(mem, start, end) {
        // The 64-bit entry of Linux runs at any address aligned like its own.
        shift = start.saturating_sub(LOWEST) & !(LINUX_ALIGN - 1);
        if want == Some(Protocol::Pvh) || shift == 0 {
            return Err(too_large);
        }
        check_fits(mem, start - shift, end - shift).map_err(|_| too_large)?;
        (protocol, entry) = (Protocol::Linux64, header.e_entry);
    }
    let inside = loadable(&segments).any(|s| entry >= s.p_paddr && entry - s.p_paddr < s.p_memsz);
    if !inside {
        return Err(KernelError::EntryOutside(entry));
    }

    for segment in loadable(&segments) {
        // What is behind p_filesz is zero, as fresh guest memory is.
        place_kernel(
            mem,
            file,
            segment.p_offset,
            segment.p_paddr - shift,
            segment.p_filesz,
        )?;
    }
    Ok(Kernel {
        entry: entry - shift,
        protocol,
        start: start - shift,
        end: end - shift,
        header: None,
    })
}

fn loadable(segments: &[Elf64_Phdr]) -> impl Iterator<Item = &Elf64_Phdr> {
    segments
        .iter()
        .filter(|s| s.p_type == PT_LOAD && s.p_memsz > 0)
}

fn read_header(file: &File, file_len: u64) -> Result<Elf64_Ehdr, KernelError> {
    let mut header = Elf64_Ehdr::default();
    within(
        "the ELF header",
        0,
        size_of::<Elf64_Ehdr>() as u64,
        file_len,
    )?;
    file.read_exact_at(header.as_mut_slice(), 0)
        .map_err(reading("ELF header"))?;
    if header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_ident[EI_DATA] != ELFDATA2LSB {
        return Err(KernelError::UnsupportedElf(
            "it is not 64-bit little-endian",
        ));
    }
    if header.e_machine != EM_X86_64 {
        return Err(KernelError::UnsupportedElf("it is not for x86-64"));
    }
    if ![ET_EXEC, ET_DYN].contains(&header.e_type) {
        return Err(KernelError::UnsupportedElf("it is not executable"));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(KernelError::MalformedElf(
            "its program headers have the wrong size",
        ));
    }
    Ok(header)
}

fn read_segments(
    file: &File,
    file_len: u64,
    header: &Elf64_Ehdr,
) -> Result<Vec<Elf64_Phdr>, KernelError> {
    let size = u64::from(header.e_phnum) * size_of::<Elf64_Phdr>() as u64;
    within("the program headers", header.e_phoff, size, file_len)?;
    let mut segments = vec![Elf64_Phdr::default(); usize::from(header.e_phnum)];
    let mut offset = header.e_phoff;
    for segment in &mut segments {
        file.read_exact_at(segment.as_mut_slice(), offset)
            .map_err(reading("program headers"))?;
        offset += size_of::<Elf64_Phdr>() as u64;
    }
    Ok(segments)
}

/// Checks a loadable segment against the file; returns its end.
fn check_segment(segment: &Elf64_Phdr, file_len: u64) -> Result<u64, KernelError> {
    within("a segment", segment.p_offset, segment.p_filesz, file_len)?;
    if segment.p_filesz > segment.p_memsz {
        return Err(KernelError::MalformedElf(
            "a segment is larger in the file than in memory",
        ));
    }
    if segment.p_paddr < HIMEM_START {
        return Err(KernelError::MalformedElf(
            "a segment lies below 1 MiB, where the boot structures are",
        ));
    }
    segment
        .p_paddr
        .checked_add(segment.p_memsz)
        .ok_or(KernelError::MalformedElf("a segment's end overflows"))
}

fn choose_entry(
    file: &File,
    file_len: u64,
    header: &Elf64_Ehdr,
    segments: &[Elf64_Phdr],
    want: Option<Protocol>,
) -> Result<(Protocol, u64), KernelError> {
    if want == Some(Protocol::Linux64) {
        return Ok((Protocol::Linux64, header.e_entry));
    }
    match (pvh_entry(file, file_len, segments)?, want) {
        (Some(entry), _) => Ok((Protocol::Pvh, entry)),
        (None, Some(_)) => Err(KernelError::NoPvhEntry),
        (None, None) => Ok((Protocol::Linux64, header.e_entry)),
    }
}

fn pvh_entry(
    file: &File,
    file_len: u64,
    segments: &[Elf64_Phdr],
) -> Result<Option<u64>, KernelError> {
    for segment in segments.iter().filter(|s| s.p_type == PT_NOTE) {
        within(
            "a note segment",
            segment.p_offset,
            segment.p_filesz,
            file_len,
        )?;
        let len = usize::try_from(segment.p_filesz).ok();
        let Some(len) = len.filter(|&len| len <= NOTES_MAX) else {
            return Err(KernelError::MalformedElf("a note segment is too large"));
        };
        let mut notes = vec![0; len];
        file.read_exact_at(&mut notes, segment.p_offset)
            .map_err(reading("notes"))?;
        // gABI: notes are aligned to 4 bytes, or to 8 when the segment is.
        let align = if segment.p_align == 8 { 8 } else { 4 };
        if let Some(entry) = find_pvh_note(&notes, align) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Looks for Xen's entry note; a malformed note ends the search.
fn find_pvh_note(notes: &[u8], align: usize) -> Option<u64> {
    const HEADER: usize = size_of::<Elf64_Nhdr>();
    let mut at = 0usize;
    loop {
        let mut header = Elf64_Nhdr::default();
        header
            .as_mut_slice()
            .copy_from_slice(notes.get(at..at.checked_add(HEADER)?)?);
        let name_at = at + HEADER;
        let name_end = name_at.checked_add(header.n_namesz as usize)?;
        let desc_at = name_end.checked_next_multiple_of(align)?;
        let desc_end = desc_at.checked_add(header.n_descsz as usize)?;
        let name = notes.get(name_at..name_end)?;
        let desc = notes.get(desc_at..desc_end)?;
        if header.n_type == XEN_ELFNOTE_PHYS32_ENTRY && name == XEN_NOTE_NAME {
            // The note is as wide as the kernel's pointers; the entry is 32-bit.
            let (low, high) = desc.split_first_chunk::<4>()?;
            return high
                .iter()
                .all(|&byte| byte == 0)
                .then(|| u64::from(u32::from_le_bytes(*low)));
        }
        at = desc_end.checked_next_multiple_of(align)?;
    }
}

fn within(what: &'static str, offset: u64, len: u64, have: u64) -> Result<(), KernelError> {
    let need = offset
        .checked_add(len)
        .ok_or(KernelError::MalformedElf("an offset overflows"))?;
    if need > have {
        return Err(KernelError::Truncated { what, need, have });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::{file_of, memory};
    use crate::kernel::{self};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    const ENTRY: u64 = 0x20_0010;
    const PVH: u64 = 0x20_0020;
    const RAM: usize = 8 << 20;

    fn note(align: usize, desc: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, kind, desc) in [(&b"GNU\0"[..], 3, &[7u8; 5][..]), (b"Xen\0", 18, desc)] {
            for word in [name.len() as u32, desc.len() as u32, kind] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend(name);
            bytes.resize(bytes.len().next_multiple_of(align), 0);
            bytes.extend(desc);
            bytes.resize(bytes.len().next_multiple_of(align), 0);
        }
        bytes
    }

    fn header(phnum: u16) -> Elf64_Ehdr {
        let mut header = Elf64_Ehdr {
            e_type: ET_EXEC,
            e_machine: EM_X86_64,
            e_entry: ENTRY,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: phnum,
            ..Default::default()
        };
        header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header
    }

    fn image(with_note: bool) -> Vec<u8> {
        let notes = note(4, &PVH.to_le_bytes());
        let load = Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: 0x1000,
            p_paddr: 0x20_0000,
            p_filesz: 0x1800,
            p_memsz: 0x4000,
            ..Default::default()
        };
        let note = Elf64_Phdr {
            p_type: PT_NOTE,
            p_offset: 0x400,
            p_filesz: notes.len() as u64,
            p_align: 4,
            ..Default::default()
        };
        let mut bytes = header(if with_note { 2 } else { 1 }).as_slice().to_vec();
        bytes.extend(load.as_slice());
        bytes.extend(note.as_slice());
        bytes.resize(0x400, 0);
        bytes.extend(notes);
        bytes.resize(0x1000, 0);
        bytes.resize(0x2000, 0xaa);
        bytes.resize(0x2800, 0xbb);
        bytes
    }

    fn load_bytes(bytes: &[u8], want: Option<Protocol>) -> Result<Kernel, KernelError> {
        kernel::load(&memory(RAM), &mut file_of(bytes), want)
    }

    #[test]
    fn the_note_chooses_pvh_and_the_caller_may_choose_otherwise() {
        let kernel = load_bytes(&image(true), None).unwrap();
        assert_eq!((kernel.protocol, kernel.entry), (Protocol::Pvh, PVH));
        assert_eq!(kernel.end, 0x20_4000);
        let kernel = load_bytes(&image(true), Some(Protocol::Linux64)).unwrap();
        assert_eq!((kernel.protocol, kernel.entry), (Protocol::Linux64, ENTRY));
        let kernel = load_bytes(&image(false), None).unwrap();
        assert_eq!((kernel.protocol, kernel.entry), (Protocol::Linux64, ENTRY));
        assert!(matches!(
            load_bytes(&image(false), Some(Protocol::Pvh)),
            Err(KernelError::NoPvhEntry)
        ));
    }

    #[test]
    fn what_is_behind_the_file_stays_zero() {
        let mem = memory(RAM);
        kernel::load(&mem, &mut file_of(&image(true)), None).unwrap();
        let byte = |addr| mem.read_obj::<u8>(GuestAddress(addr)).unwrap();
        assert_eq!((byte(0x20_0fff), byte(0x20_1000)), (0xaa, 0xbb));
        assert_eq!((byte(0x20_17ff), byte(0x20_1800)), (0xbb, 0));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = image(true);
        for len in (4..0x600).chain([0xfff, 0x1000, 0x2000, 0x27ff]) {
            assert!(load_bytes(&bytes[..len], None).is_err(), "{len} bytes");
        }
        assert!(matches!(
            load_bytes(&bytes[..0x2000], None),
            Err(KernelError::Truncated { .. })
        ));
    }

    /// The image, linked to `paddr`.
    fn image_at(paddr: u64) -> Vec<u8> {
        let mut bytes = image(true);
        bytes[24..32].copy_from_slice(&(paddr + 0x10).to_le_bytes()); // e_entry
        bytes[64 + 24..64 + 32].copy_from_slice(&paddr.to_le_bytes()); // p_paddr
        bytes
    }

    #[test]
    fn a_kernel_linked_beyond_memory_moves_down() {
        let bytes = image_at(0x100_0000);
        let mem = memory(RAM);
        let kernel = kernel::load(&mem, &mut file_of(&bytes), None).unwrap();
        assert_eq!(kernel.protocol, Protocol::Linux64);
        assert_eq!((kernel.start, kernel.end), (0x20_0000, 0x20_4000));
        assert_eq!(kernel.entry, 0x20_0010);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(0x20_0000)).unwrap(), 0xaa);
        assert!(matches!(
            load_bytes(&bytes, Some(Protocol::Pvh)),
            Err(KernelError::DoesNotFit { .. })
        ));
    }

    #[test]
    fn a_kernel_larger_than_memory_is_refused() {
        let result = kernel::load(&memory(0x20_1000), &mut file_of(&image(true)), None);
        assert!(matches!(result, Err(KernelError::DoesNotFit { .. })));
    }

    #[test]
    fn notes_of_both_alignments_and_widths() {
        for align in [4, 8] {
            assert_eq!(
                find_pvh_note(&note(align, &PVH.to_le_bytes()), align),
                Some(PVH)
            );
            assert_eq!(
                find_pvh_note(&note(align, &(PVH as u32).to_le_bytes()), align),
                Some(PVH)
            );
            assert_eq!(find_pvh_note(&note(align, &[1, 2]), align), None);
            assert_eq!(find_pvh_note(&note(align, &[0xff; 8]), align), None);
        }
    }

    proptest! {
        #[test]
        fn hostile_headers_never_panic(
            patches in prop::collection::vec((0usize..0x460, any::<u64>(), 1usize..=8), 1..12),
            len in 0usize..=0x2800,
        ) {
            let mut bytes = image(true);
            for (at, value, width) in patches {
                bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            let _ = load_bytes(&bytes, None);
            let _ = load_bytes(&bytes[..len], None);
        }

        #[test]
        fn hostile_segments_never_panic(fields: [u64; 5], align: u64) {
            let load = Elf64_Phdr {
                p_type: PT_LOAD,
                p_offset: fields[0],
                p_paddr: fields[1],
                p_filesz: fields[2],
                p_memsz: fields[3],
                ..Default::default()
            };
            let note = Elf64_Phdr { p_type: PT_NOTE, p_offset: fields[4], p_filesz: fields[2],
                p_align: align, ..Default::default() };
            let mut bytes = header(2).as_slice().to_vec();
            bytes.extend(load.as_slice());
            bytes.extend(note.as_slice());
            prop_assert!(load_bytes(&bytes, None).is_err());
        }

        #[test]
        fn hostile_notes_never_panic(notes: Vec<u8>) {
            find_pvh_note(&notes, 4);
            find_pvh_note(&notes, 8);
        }
    }
}
