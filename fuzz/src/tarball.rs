//! Archives whose sums are right, whatever else is wrong with them: a fuzzer finds no
//! sums by itself.

const BLOCK: usize = 512;
const SIZE: std::ops::Range<usize> = 124..136;
const SUM: std::ops::Range<usize> = 148..156;

fn octal(field: &[u8]) -> u64 {
    let digits = field.iter().skip_while(|&&byte| byte == b' ');
    let digits = digits.take_while(|byte| (b'0'..=b'7').contains(byte));
    digits.fold(0, |sum, digit| sum << 3 | u64::from(digit - b'0'))
}

fn sum(header: &mut [u8]) {
    header[SUM].fill(b' ');
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header[SUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Corrects the sums of an archive's headers, as far as they follow each other.
pub fn sealed(archive: &[u8]) -> Vec<u8> {
    let mut archive = archive.to_vec();
    archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    let mut at = 0;
    while let Some(header) = archive.get_mut(at..at + BLOCK) {
        if header.iter().any(|&byte| byte != 0) {
            sum(header);
        }
        let data = octal(&header[SIZE]).next_multiple_of(BLOCK as u64);
        at = at.saturating_add(BLOCK).saturating_add(data as usize);
    }
    archive
}

/// Appends a file.
pub fn append(archive: &mut Vec<u8>, name: &str, data: &[u8]) {
    let mut header = [0; BLOCK];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    header[SIZE].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    sum(&mut header);
    archive.extend(header);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(BLOCK), 0);
}
