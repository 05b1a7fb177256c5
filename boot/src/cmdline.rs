//! The kernel's command line.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::layout::{CMDLINE, CMDLINE_MAX};

/// Why a command line is not acceptable.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// Linux would cut it off.
    #[error("it has {len} bytes; at most {max} fit")]
    TooLong {
        /// Its length.
        len: usize,
        /// The longest possible.
        max: usize,
    },
    /// A character is not printable ASCII.
    #[error("character {character:?} at byte {at} is not printable ASCII")]
    Character {
        /// The character.
        character: char,
        /// Its offset in bytes.
        at: usize,
    },
    /// Guest memory has no room.
    #[error("writing it to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Checks that a kernel would take the command line as it is.
pub fn validate(cmdline: &str) -> Result<(), CmdlineError> {
    let max = CMDLINE_MAX as usize - 1;
    if cmdline.len() > max {
        let len = cmdline.len();
        return Err(CmdlineError::TooLong { len, max });
    }
    match cmdline
        .char_indices()
        .find(|(_, c)| !matches!(c, ' '..='~'))
    {
        Some((at, character)) => Err(CmdlineError::Character { character, at }),
        None => Ok(()),
    }
}

/// Writes the command line, NUL-terminated, to its place.
pub fn write<M: GuestMemoryBackend>(mem: &M, cmdline: &str) -> Result<(), CmdlineError> {
    validate(cmdline)?;
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    mem.write_slice(&bytes, GuestAddress(CMDLINE.into()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_only_short_printable_ascii() {
        assert!(validate("").is_ok());
        assert!(validate("console=ttyS0 a=\"b c\" ~").is_ok());
        assert!(validate(&"x".repeat(2047)).is_ok());
        assert!(matches!(
            validate(&"x".repeat(2048)),
            Err(CmdlineError::TooLong { .. })
        ));
        for bad in ["a\0b", "a\nb", "a\tb", "ü", "\x7f"] {
            assert!(matches!(validate(bad), Err(CmdlineError::Character { .. })));
        }
    }
}
