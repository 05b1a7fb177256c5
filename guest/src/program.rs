//! What a program's file says of who executes it: read where Linux' `execve` refused it,
//! to tell why. The file is an image's, and may say anything.

/// How much of a file's beginning says it.
pub const HEAD: usize = 64 << 10;

/// `e_machine` of what an x86-64 kernel executes (`linux/elf-em.h`).
const OWN_CPUS: [u16; 2] = [3, 62];
const ELF: &[u8] = b"\x7fELF";
/// `e_ident`: 64 bits, little-endian.
const ELF64_LE: &[u8] = &[2, 1];
const E_MACHINE: usize = 18;
const E_PHOFF: usize = 32;
const E_PHENTSIZE: usize = 54;
const E_PHNUM: usize = 56;
const PT_INTERP: u32 = 3;
const P_OFFSET: usize = 8;
const P_FILESZ: usize = 32;
/// More program headers than any program's.
const HEADERS_MAX: u16 = 128;

/// The program that a file names to execute it: behind `#!`, or its dynamic loader.
pub fn interpreter(head: &[u8]) -> Option<&[u8]> {
    match head.strip_prefix(b"#!") {
        Some(line) => {
            let line = line.split(|&byte| byte == b'\n').next()?;
            let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
            let word = line.split(blank).find(|word| !word.is_empty())?;
            Some(word)
        }
        None => loader(head),
    }
}

/// True for an ELF file of a CPU whose programs this kernel does not execute.
pub fn is_foreign(head: &[u8]) -> bool {
    let machine = number(head, E_MACHINE).map(u16::from_le_bytes);
    head.starts_with(ELF) && machine.is_some_and(|machine| !OWN_CPUS.contains(&machine))
}

/// The loader of a 64-bit ELF file.
fn loader(head: &[u8]) -> Option<&[u8]> {
    if !head.strip_prefix(ELF)?.starts_with(ELF64_LE) {
        return None;
    }
    let start = usize::try_from(u64::from_le_bytes(number(head, E_PHOFF)?)).ok()?;
    let len = usize::from(u16::from_le_bytes(number(head, E_PHENTSIZE)?));
    let count = u16::from_le_bytes(number(head, E_PHNUM)?).min(HEADERS_MAX);
    let headers = (0..usize::from(count)).filter_map(|index| {
        let at = start.checked_add(index.checked_mul(len)?)?;
        head.get(at..at.checked_add(len)?)
    });
    let mut loaders = headers.filter(|header| {
        let kind = number(header, 0).map(u32::from_le_bytes);
        kind == Some(PT_INTERP)
    });
    let header = loaders.next()?;
    let field = |at| usize::try_from(u64::from_le_bytes(number(header, at)?)).ok();
    let (offset, size) = (field(P_OFFSET)?, field(P_FILESZ)?);
    let path = head.get(offset..offset.checked_add(size)?)?;
    path.split(|&byte| byte == 0).next()
}

fn number<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_name_their_interpreters() {
        for (head, expected) in [
            (&b"#!/bin/sh\necho"[..], Some(&b"/bin/sh"[..])),
            (b"#! \t/usr/bin/env  python3\n", Some(b"/usr/bin/env")),
            (b"#!/bin/sh\r\necho", Some(b"/bin/sh\r")),
            (b"#!/bin/sh", Some(b"/bin/sh")),
            (b"#!\n", None),
            (b"#!  \n/bin/sh", None),
            (b"echo", None),
            (b"", None),
        ] {
            assert_eq!(interpreter(head), expected, "{head:?}");
        }
    }

    /// A program of a CPU with a loader's path behind one program header.
    fn elf(machine: u16, phoff: u64, offset: u64, size: u64) -> Vec<u8> {
        let mut head = [ELF, ELF64_LE].concat();
        head.resize(64, 0);
        head[E_MACHINE..][..2].copy_from_slice(&machine.to_le_bytes());
        head[E_PHOFF..][..8].copy_from_slice(&phoff.to_le_bytes());
        head[E_PHENTSIZE..][..2].copy_from_slice(&56_u16.to_le_bytes());
        head[E_PHNUM..][..2].copy_from_slice(&1_u16.to_le_bytes());
        let mut header = vec![0; 56];
        header[..4].copy_from_slice(&PT_INTERP.to_le_bytes());
        header[P_OFFSET..][..8].copy_from_slice(&offset.to_le_bytes());
        header[P_FILESZ..][..8].copy_from_slice(&size.to_le_bytes());
        [head, header, b"/lib64/ld.so\0rest".to_vec()].concat()
    }

    #[test]
    fn programs_name_their_loaders() {
        assert_eq!(
            interpreter(&elf(62, 64, 120, 13)),
            Some(&b"/lib64/ld.so"[..])
        );
        for broken in [
            elf(62, u64::MAX, 120, 13),
            elf(62, 64, u64::MAX, 13),
            elf(62, 64, 120, u64::MAX),
            elf(62, 64, 120, 13)[..70].to_vec(),
            b"\x7fELF".to_vec(),
        ] {
            assert_eq!(interpreter(&broken), None);
        }
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert!(!is_foreign(&own));
        assert!(is_foreign(&elf(183, 64, 120, 13)));
        assert!(!is_foreign(b"\x7fELF"));
    }
}
