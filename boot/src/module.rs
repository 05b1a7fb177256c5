//! Kernel modules without what costs a guest time: most of loading one is the
//! check of its signature, and of its type information (BTF) against the kernel's.
//!
//! Who gives the guest its modules gives it its kernel, too, so a signature
//! protects nobody. That it lacks, the kernel shows by a taint flag (`E`).

use std::mem::offset_of;

use linux_loader::elf::{
    Elf64_Ehdr, Elf64_Shdr, SHF_ALLOC, SHT_NOBITS, SHT_NULL, SHT_PROGBITS, SHT_RELA,
};
use vm_memory::ByteValued;

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// `e_ident`, System V gABI chapter 4: class, byte order.
const EI_CLASS: usize = 4;
const EI_DATA: usize = 5;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const ET_REL: u16 = 1;
const HEADER: usize = size_of::<Elf64_Ehdr>();
const SECTION: usize = size_of::<Elf64_Shdr>();
const TABLE_ALIGN: usize = align_of::<Elf64_Shdr>();
/// No section of a module wants more than a page.
const ALIGN_MAX: usize = 4096;

/// A section's place in the file, and what says whether it is needed.
struct Section {
    kind: u32,
    flags: u64,
    offset: usize,
    len: usize,
    align: usize,
    /// Of relocations: the section that they are for.
    target: usize,
}

impl Section {
    fn read(entry: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(*entry.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u64::from_le_bytes(*entry.get(at..)?.first_chunk()?));
        let size = |at: usize| usize::try_from(long(at)?).ok();
        Some(Section {
            kind: word(offset_of!(Elf64_Shdr, sh_type))?,
            flags: long(offset_of!(Elf64_Shdr, sh_flags))?,
            offset: size(offset_of!(Elf64_Shdr, sh_offset))?,
            len: size(offset_of!(Elf64_Shdr, sh_size))?,
            align: size(offset_of!(Elf64_Shdr, sh_addralign))?.max(1),
            target: word(offset_of!(Elf64_Shdr, sh_info))? as usize,
        })
    }

    fn is_loaded(&self) -> bool {
        self.flags & SHF_ALLOC != 0
    }

    /// Left out are data that are not loaded, and relocations of such.
    fn is_needed(&self, all: &[Section]) -> bool {
        match self.kind {
            SHT_PROGBITS | SHT_NOBITS => self.is_loaded(),
            SHT_RELA => all.get(self.target).is_some_and(Section::is_loaded),
            _ => true,
        }
    }
}

/// The module with what the kernel needs to load it, and nothing else. None, if
/// it is not a module as they are known.
pub fn slim(module: &[u8]) -> Option<Vec<u8>> {
    let mut header = Elf64_Ehdr::default();
    header.as_mut_slice().copy_from_slice(module.get(..HEADER)?);
    let known = header.e_ident.starts_with(ELF_MAGIC)
        && header.e_ident[EI_CLASS] == ELFCLASS64
        && header.e_ident[EI_DATA] == ELFDATA2LSB
        && header.e_type == ET_REL
        && usize::from(header.e_shentsize) == SECTION;
    if !known {
        return None;
    }
    let start = usize::try_from(header.e_shoff).ok()?;
    let end = start.checked_add(usize::from(header.e_shnum) * SECTION)?;
    let mut table = module.get(start..end)?.to_vec();
    let sections = table.chunks_exact(SECTION).map(Section::read);
    let sections: Vec<Section> = sections.collect::<Option<_>>()?;

    let mut out = vec![0; HEADER];
    for (section, entry) in sections.iter().zip(table.chunks_exact_mut(SECTION)) {
        if !section.is_needed(&sections) {
            // Its place in the table stays, as others are known by theirs.
            entry.fill(0);
            continue;
        }
        if section.kind == SHT_NULL {
            continue;
        }
        pad(&mut out, section.align)?;
        let offset = out.len() as u64;
        if section.kind != SHT_NOBITS {
            let end = section.offset.checked_add(section.len)?;
            out.extend_from_slice(module.get(section.offset..end)?);
        }
        let field = entry.get_mut(offset_of!(Elf64_Shdr, sh_offset)..)?;
        *field.first_chunk_mut()? = offset.to_le_bytes();
    }
    pad(&mut out, TABLE_ALIGN)?;
    header.e_shoff = out.len() as u64;
    out.extend(table);
    out.get_mut(..HEADER)?.copy_from_slice(header.as_slice());
    Some(out)
}

fn pad(out: &mut Vec<u8>, align: usize) -> Option<()> {
    if align > ALIGN_MAX {
        return None;
    }
    out.resize(out.len().next_multiple_of(align), 0);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux_loader::elf::{SHT_STRTAB, SHT_SYMTAB};
    use proptest::prelude::*;

    /// Type, flags, data, and the section that relocations are for.
    type TestSection<'a> = (u32, u64, &'a [u8], usize);

    const TEXT: TestSection = (SHT_PROGBITS, SHF_ALLOC, b"code", 0);
    const ALL: [TestSection; 8] = [
        (SHT_NULL, 0, b"", 0),
        TEXT,
        (SHT_RELA, 0, b"of code", 1),
        (SHT_PROGBITS, 0, b"types", 0),
        (SHT_RELA, 0, b"of types", 3),
        (SHT_NOBITS, SHF_ALLOC, b"", 0),
        (SHT_SYMTAB, 0, b"symbols", 1),
        (SHT_STRTAB, 0, b"names", 0),
    ];

    fn module(sections: &[TestSection]) -> Vec<u8> {
        let mut header = Elf64_Ehdr {
            e_type: ET_REL,
            e_shentsize: SECTION as u16,
            e_shnum: sections.len() as u16,
            ..Default::default()
        };
        header.e_ident[..ELF_MAGIC.len()].copy_from_slice(ELF_MAGIC);
        header.e_ident[EI_CLASS] = ELFCLASS64;
        header.e_ident[EI_DATA] = ELFDATA2LSB;
        let mut out = vec![0; HEADER];
        let mut table = Vec::new();
        for (kind, flags, data, target) in sections {
            table.extend(0u32.to_le_bytes());
            table.extend(kind.to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(0u64.to_le_bytes());
            table.extend((out.len() as u64).to_le_bytes());
            table.extend((data.len() as u64).to_le_bytes());
            table.extend(0u32.to_le_bytes());
            table.extend((*target as u32).to_le_bytes());
            table.extend(8u64.to_le_bytes());
            table.extend(0u64.to_le_bytes());
            out.extend_from_slice(data);
        }
        header.e_shoff = out.len() as u64;
        out.extend(table);
        out[..HEADER].copy_from_slice(header.as_slice());
        out.extend(b"signature");
        out
    }

    fn sections(module: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut header = Elf64_Ehdr::default();
        header.as_mut_slice().copy_from_slice(&module[..HEADER]);
        module[header.e_shoff as usize..]
            .chunks_exact(SECTION)
            .map(|entry| {
                let it = Section::read(entry).unwrap();
                assert_eq!(it.offset % it.align, 0);
                (it.kind, module[it.offset..][..it.len].to_vec())
            })
            .collect()
    }

    #[test]
    fn what_is_loaded_stays_where_the_table_had_it() {
        let slim = slim(&module(&ALL)).unwrap();
        let expected = [0, 1, 2, 0, 0, 5, 6, 7].map(|index: usize| {
            let (kind, _, data, _) = ALL[index];
            (kind, data.to_vec())
        });
        assert_eq!(sections(&slim), expected);
        assert!(!slim.ends_with(b"signature"));
        // There is nothing more to leave out.
        assert_eq!(super::slim(&slim).unwrap(), slim);
    }

    #[test]
    fn what_is_no_module_is_left_alone() {
        let good = module(&ALL);
        assert_eq!(slim(b"module"), None);
        for (offset, value) in [
            (0, 0),
            (EI_CLASS, 1),
            (EI_DATA, 2),
            (offset_of!(Elf64_Ehdr, e_type), 2),
            (offset_of!(Elf64_Ehdr, e_shentsize), 8),
            (offset_of!(Elf64_Ehdr, e_shnum), 200),
            (offset_of!(Elf64_Ehdr, e_shoff) + 7, 0xff),
        ] {
            let mut bad = good.clone();
            bad[offset] = value;
            assert_eq!(slim(&bad), None, "{offset}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let mut module = module(&ALL);
            for (index, value) in changes {
                let index = index.index(module.len());
                module[index] = value;
            }
            let _ = slim(&module);
        }
    }
}
