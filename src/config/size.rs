//! Sizes: `512M`, `2G`.

/// Reads a size in bytes; a plain number counts units of `1 << plain_shift`.
pub fn parse_size(text: &str, plain_shift: u32) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(|last: char| last.is_ascii_alphabetic()) {
        None => (text, plain_shift),
        Some(digits) => match text.as_bytes().last().map(u8::to_ascii_uppercase) {
            Some(b'K') => (digits, 10),
            Some(b'M') => (digits, 20),
            Some(b'G') => (digits, 30),
            Some(b'T') => (digits, 40),
            _ => return Err("unknown unit; write 512M or 2G".into()),
        },
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("not a size; write 512M or 2G".into());
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "too large".into())
}
