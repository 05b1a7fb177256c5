//! Conversions of numbers that `From` does not have.

/// The lower half of a number, and the upper one.
pub fn halves(number: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = number.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

/// A length that fits where there are 32 bits for it, as that of a chain does.
pub fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
