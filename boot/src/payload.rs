//! The ELF kernel (vmlinux) inside of a bzImage.
//!
//! Booting the ELF spares the guest its decompressor: the file is mapped and
//! only what is touched is read. The payload is described by the setup header
//! (Linux' `Documentation/arch/x86/boot.rst`, `payload_offset`).

use std::io::Read;
use std::mem::offset_of;

use linux_loader::bootparam::{boot_params, setup_header};
use vm_memory::ByteValued;

use crate::decoders::{unxz, unzstd};
use crate::trim::trim_segments;

const HEADER_OFFSET: usize = offset_of!(boot_params, hdr);
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const SECTOR: usize = 512;
const DEFAULT_SETUP_SECTORS: u8 = 4;
const ELF_MAGIC: &[u8] = b"\x7fELF";
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const XZ_MAGIC: &[u8] = b"\xfd7zXZ\0";
const LZ4_LEGACY_MAGIC: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
/// A block of the legacy LZ4 frame unpacks to at most this.
const LZ4_BLOCK: usize = 8 << 20;
/// The build appends the unpacked size to the compressed kernel.
const SIZE_TRAILER: usize = 4;
/// No kernel is larger than this; a file that claims so is refused.
const VMLINUX_MAX: u64 = 1 << 30;

/// Why there is no ELF kernel to be had from a file.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The file has no setup header.
    #[error("not a bzImage")]
    NotABzImage,
    /// The header points outside of the file.
    #[error("the bzImage is truncated: its payload lies beyond the end of the file")]
    Truncated,
    /// The compression is none of those that are known.
    #[error("the kernel inside is compressed in an unknown way; zstd, xz and lz4 are supported")]
    UnknownCompression,
    /// The payload is damaged.
    #[error("unpacking the kernel: {0}")]
    Corrupt(String),
    /// What was unpacked is no ELF file.
    #[error("the payload is not an ELF kernel")]
    NotAnElf,
}

/// Unpacks the ELF kernel from the bytes of a bzImage; its segments end with what is not
/// zero.
pub fn extract_vmlinux(image: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let payload = payload(image)?;
    let mut vmlinux = if payload.starts_with(ZSTD_MAGIC) {
        read_all(unzstd(payload).map_err(corrupt)?)?
    } else if payload.starts_with(XZ_MAGIC) {
        read_all(unxz(payload))?
    } else if payload.starts_with(LZ4_LEGACY_MAGIC) {
        unlz4(payload)?
    } else if payload.starts_with(ELF_MAGIC) {
        payload.to_vec()
    } else {
        return Err(PayloadError::UnknownCompression);
    };
    if !vmlinux.starts_with(ELF_MAGIC) {
        return Err(PayloadError::NotAnElf);
    }
    trim_segments(&mut vmlinux);
    Ok(vmlinux)
}

fn payload(image: &[u8]) -> Result<&[u8], PayloadError> {
    let mut header = setup_header::default();
    let bytes = image
        .get(HEADER_OFFSET..HEADER_OFFSET + size_of::<setup_header>())
        .ok_or(PayloadError::NotABzImage)?;
    header.as_mut_slice().copy_from_slice(bytes);
    if header.header != HEADER_MAGIC {
        return Err(PayloadError::NotABzImage);
    }
    let sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTORS,
        count => count,
    };
    let start = ((usize::from(sectors) + 1) * SECTOR)
        .checked_add(header.payload_offset as usize)
        .ok_or(PayloadError::Truncated)?;
    let end = start
        .checked_add(header.payload_length as usize)
        .ok_or(PayloadError::Truncated)?;
    image.get(start..end).ok_or(PayloadError::Truncated)
}

fn corrupt(error: impl std::fmt::Display) -> PayloadError {
    PayloadError::Corrupt(error.to_string())
}

fn read_all(decoder: impl Read) -> Result<Vec<u8>, PayloadError> {
    let mut out = Vec::new();
    decoder
        .take(VMLINUX_MAX)
        .read_to_end(&mut out)
        .map_err(corrupt)?;
    Ok(out)
}

fn unlz4(packed: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let mut rest = packed.get(LZ4_LEGACY_MAGIC.len()..).unwrap_or_default();
    let mut out = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while rest.len() > SIZE_TRAILER {
        let (len, tail) = rest
            .split_first_chunk::<4>()
            .ok_or(PayloadError::Truncated)?;
        let (data, tail) = tail
            .split_at_checked(u32::from_le_bytes(*len) as usize)
            .ok_or(PayloadError::Truncated)?;
        let len = lz4_flex::block::decompress_into(data, &mut block).map_err(corrupt)?;
        out.extend_from_slice(block.get(..len).unwrap_or_default());
        if out.len() as u64 > VMLINUX_MAX {
            return Err(corrupt("larger than 1 GiB"));
        }
        rest = tail;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn image(payload: &[u8]) -> Vec<u8> {
        let header = setup_header {
            header: HEADER_MAGIC,
            setup_sects: 1,
            payload_offset: 16,
            payload_length: payload.len() as u32,
            ..Default::default()
        };
        let mut image = vec![0; 2 * SECTOR + 16];
        image[HEADER_OFFSET..HEADER_OFFSET + size_of::<setup_header>()]
            .copy_from_slice(header.as_slice());
        image.extend_from_slice(payload);
        image
    }

    fn lz4(data: &[u8]) -> Vec<u8> {
        let packed = lz4_flex::block::compress(data);
        let mut payload = LZ4_LEGACY_MAGIC.to_vec();
        payload.extend((packed.len() as u32).to_le_bytes());
        payload.extend(packed);
        payload.extend((data.len() as u32).to_le_bytes());
        payload
    }

    #[test]
    fn unpacks_each_format() {
        let elf = [ELF_MAGIC, &[7; 100_000]].concat();
        assert_eq!(extract_vmlinux(&image(&elf)).unwrap(), elf);
        assert_eq!(extract_vmlinux(&image(&lz4(&elf))).unwrap(), elf);
        let mut packed = zstd::encode_all(elf.as_slice(), 1).unwrap();
        packed.extend((elf.len() as u32).to_le_bytes());
        assert_eq!(extract_vmlinux(&image(&packed)).unwrap(), elf);
        let mut options = lzma_rust2::XzOptions::with_preset(0);
        options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(&elf).unwrap();
        let mut packed = writer.finish().unwrap();
        packed.extend((elf.len() as u32).to_le_bytes());
        assert_eq!(extract_vmlinux(&image(&packed)).unwrap(), elf);
    }

    #[test]
    fn refuses_what_is_not_a_kernel() {
        let refusal = |bytes: &[u8]| extract_vmlinux(bytes).unwrap_err();
        assert!(matches!(refusal(&[0; 4096]), PayloadError::NotABzImage));
        assert!(matches!(refusal(b"short"), PayloadError::NotABzImage));
        let whole = image(&lz4(b"no ELF"));
        assert!(matches!(refusal(&whole), PayloadError::NotAnElf));
        let cut = &whole[..whole.len() - 1];
        assert!(matches!(refusal(cut), PayloadError::Truncated));
        assert!(matches!(
            refusal(&image(&[0x1f, 0x8b, 0])),
            PayloadError::UnknownCompression
        ));
    }

    proptest! {
        #[test]
        fn damaged_payloads_never_panic(at in 0usize..600, byte: u8, cut in 0usize..600) {
            let mut payload = lz4(&[ELF_MAGIC, &[1, 2, 3, 4, 5].repeat(100)].concat());
            let len = payload.len();
            payload[at % len] = byte;
            payload.truncate(len - cut % len);
            let _ = extract_vmlinux(&image(&payload));
        }
    }
}
