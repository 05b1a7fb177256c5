//! Which build of mayfly this is: what one build saved is restored by the same one alone,
//! where it is a template.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use mayfly_image::Digest;

/// Where a process finds the program that it runs.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// How much of a program its header, its program headers and its notes are in.
const START: usize = 16 << 10;

// ELF-64 (System V ABI, object files): offsets in the header, and in a program header.
const MAGIC: [u8; 6] = *b"\x7fELF\x02\x01";
const E_PHOFF: usize = 32;
const E_PHENTSIZE: usize = 54;
const E_PHNUM: usize = 56;
const P_OFFSET: usize = 8;
const P_FILESZ: usize = 32;
const PT_NOTE: u32 = 4;
/// A note: the length of its name, the length of its content, its type (gABI, Note Section).
const NOTE_HEADER: usize = 12;
const NT_GNU_BUILD_ID: u32 = 3;
const GNU: &[u8] = b"GNU\0";

/// A name for this build: its linker's build ID (a digest of what was linked), or the
/// digest of the program, where it has none.
pub fn own_build() -> io::Result<String> {
    let program = File::open(OWN_PROGRAM)?;
    let mut start = vec![0; START];
    let count = program.read_at(&mut start, 0)?;
    start.truncate(count);
    match build_id(&start) {
        Some(id) => Ok(id.iter().map(|byte| format!("{byte:02x}")).collect()),
        None => {
            let mut bytes = Vec::new();
            (&program).read_to_end(&mut bytes)?;
            Ok(Digest::of(&bytes).to_string())
        }
    }
}

/// The build ID that is among the notes in the beginning of a program.
fn build_id(program: &[u8]) -> Option<&[u8]> {
    if !program.starts_with(&MAGIC) {
        return None;
    }
    let headers = usize::try_from(u64_at(program, E_PHOFF)?).ok()?;
    let size = usize::from(u16_at(program, E_PHENTSIZE)?);
    let count = usize::from(u16_at(program, E_PHNUM)?);
    (0..count).find_map(|index| {
        let header = program.get(headers.checked_add(index * size)?..)?;
        if u32_at(header, 0)? != PT_NOTE {
            return None;
        }
        let offset = usize::try_from(u64_at(header, P_OFFSET)?).ok()?;
        let len = usize::try_from(u64_at(header, P_FILESZ)?).ok()?;
        id_in_notes(program.get(offset..)?.get(..len)?)
    })
}

fn id_in_notes(mut notes: &[u8]) -> Option<&[u8]> {
    loop {
        let name_len = usize::try_from(u32_at(notes, 0)?).ok()?;
        let len = usize::try_from(u32_at(notes, 4)?).ok()?;
        let kind = u32_at(notes, 8)?;
        let rest = notes.get(NOTE_HEADER..)?;
        let name = rest.get(..name_len)?;
        let content = rest.get(name_len.checked_next_multiple_of(4)?..)?;
        if kind == NT_GNU_BUILD_ID && name == GNU {
            return content.get(..len).filter(|id| !id.is_empty());
        }
        notes = content.get(len.checked_next_multiple_of(4)?..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|it| u16::from_le_bytes(*it))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|it| u32::from_le_bytes(*it))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|it| u64::from_le_bytes(*it))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_named_by_its_build() {
        let name = own_build().unwrap();
        assert!(name.len() >= 16, "{name}");
        assert_eq!(own_build().unwrap(), name);
    }

    #[test]
    fn a_build_id_is_found_among_other_notes_and_nothing_is_trusted() {
        let note = |name: &[u8], kind: u32, content: &[u8]| {
            let mut note = Vec::new();
            note.extend((name.len() as u32).to_le_bytes());
            note.extend((content.len() as u32).to_le_bytes());
            note.extend(kind.to_le_bytes());
            note.extend(name);
            note.resize(note.len().next_multiple_of(4), 0);
            note.extend(content);
            note.resize(note.len().next_multiple_of(4), 0);
            note
        };
        let other = note(b"GNU\0", 1, b"12345");
        let stranger = note(b"Xen\0", NT_GNU_BUILD_ID, b"no");
        let id = note(GNU, NT_GNU_BUILD_ID, b"the id");
        let notes = [other, stranger, id].concat();
        assert_eq!(id_in_notes(&notes), Some(&b"the id"[..]));
        let mut program = vec![0; 128];
        program[..6].copy_from_slice(&MAGIC);
        program[E_PHOFF] = 64;
        program[E_PHENTSIZE] = 56;
        program[E_PHNUM] = 1;
        program[64] = PT_NOTE as u8;
        program[64 + P_OFFSET] = 128;
        program[64 + P_FILESZ] = notes.len() as u8;
        program.extend(&notes);
        assert_eq!(build_id(&program), Some(&b"the id"[..]));
        for len in 0..program.len() {
            assert!(build_id(&program[..len]).is_none(), "{len}");
        }
        for at in 0..program.len() {
            let mut damaged = program.clone();
            damaged[at] = 0xff;
            build_id(&damaged);
        }
    }
}
