//! What a header's fields say, as Go's reader of archives takes them, for which most
//! archives of images are made: with blanks, zeroes or nothing in them, and in base 256.

use tar::Header;

use super::error::ArchiveError;

const BAD: ArchiveError = ArchiveError::Malformed("a number in a header");
/// Where all but the oldest headers say that they are such.
const MAGIC: std::ops::Range<usize> = 257..262;
const MAJOR: std::ops::Range<usize> = 329..337;
const MINOR: std::ops::Range<usize> = 337..345;
/// Where POSIX' headers have the first part of a long name.
const PREFIX: std::ops::Range<usize> = 345..500;
/// In headers of Jörg Schilling's tar times follow it.
const PREFIX_OF_STAR: std::ops::Range<usize> = 345..476;
const STAR: &[u8] = b"tar\0";

/// A field's number. A negative one is none.
pub fn number(field: &[u8]) -> Result<u64, ArchiveError> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => binary(field),
        _ => octal(field),
    }
}

/// Base 256, in two's complement.
fn binary(field: &[u8]) -> Result<u64, ArchiveError> {
    if field.first().is_some_and(|first| first & 0x40 != 0) {
        return Err(BAD);
    }
    field
        .iter()
        .enumerate()
        .try_fold(0, |sum: u64, (at, byte)| {
            let byte = if at == 0 { byte & 0x3f } else { *byte };
            let sum = sum.checked_mul(256).ok_or(BAD)?;
            Ok(sum | u64::from(byte))
        })
}

fn octal(field: &[u8]) -> Result<u64, ArchiveError> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().take_while(|byte| blank(byte)).count();
    let digits = field.get(start..).unwrap_or_default();
    // What follows a zero is no part of it.
    let digits = digits.split(|byte| *byte == 0).next().unwrap_or_default();
    digits
        .trim_ascii_end()
        .iter()
        .try_fold(0, |sum: u64, byte| {
            let digit = byte.checked_sub(b'0').filter(|digit| *digit < 8);
            let sum = sum.checked_mul(8).ok_or(BAD)?;
            Ok(sum | u64::from(digit.ok_or(BAD)?))
        })
}

/// A field's number, if there is place for it where it goes.
pub fn small(field: &[u8]) -> Result<u32, ArchiveError> {
    number(field)?.try_into().map_err(|_| BAD)
}

/// A time as a file system keeps it: nothing before 1970.
pub fn time(field: &[u8]) -> Result<u32, ArchiveError> {
    match field.first() {
        Some(first) if first & 0xc0 == 0xc0 => Ok(0),
        _ => Ok(number(field)?.try_into().unwrap_or(u32::MAX)),
    }
}

/// A device's numbers; old headers have no place for them.
pub fn device(header: &Header) -> Result<(u32, u32), ArchiveError> {
    let bytes = header.as_bytes();
    let field = |range| small(bytes.get(range).unwrap_or_default());
    match bytes.get(MAGIC) {
        Some(b"ustar") => Ok((field(MAJOR)?, field(MINOR)?)),
        _ => Ok((0, 0)),
    }
}

/// The name in a header.
pub fn path(header: &Header) -> Vec<u8> {
    let until_nul = |field: &[u8]| -> Vec<u8> {
        field
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default()
            .to_vec()
    };
    let bytes = header.as_bytes();
    let name = until_nul(&header.as_old().name);
    // Whatever version it says: some writers leave that empty.
    if bytes.get(257..263) != Some(b"ustar\0") {
        return name;
    }
    let prefix = match bytes.get(508..) {
        Some(STAR) => PREFIX_OF_STAR,
        _ => PREFIX,
    };
    let prefix = until_nul(bytes.get(prefix).unwrap_or_default());
    match prefix.is_empty() {
        true => name,
        false => [prefix.as_slice(), b"/", &name].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_what_go_takes_for_them() {
        let good: [(&[u8], u64); 9] = [
            (b"0000644\0", 0o644),
            (b"   644 \0", 0o644),
            (b"\0\0 644\0\0", 0o644),
            (b"644\0junk", 0o644),
            (b"00000644", 0o644),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"        ", 0),
            (b"\x80\0\0\0\0\0\x01\x02", 0x102),
            (b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", u64::MAX),
        ];
        for (field, value) in good {
            assert_eq!(number(field).ok(), Some(value), "{field:?}");
        }
        let bad: [&[u8]; 5] = [
            b"0000648\0",
            b"-644\0",
            b"6 44\0",
            b"\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x80\0\0\x01\0\0\0\0\0\0\0\0",
        ];
        for field in bad {
            assert!(number(field).is_err(), "{field:?}");
        }
        assert_eq!(
            time(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe").ok(),
            Some(0)
        );
        assert_eq!(time(b"77777777777\0").ok(), Some(u32::MAX));
        assert!(small(b"77777777777\0").is_err());
    }
}
