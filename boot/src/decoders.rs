//! Decoders of kernels and modules. What they hold in memory is bounded, whatever a
//! file declares.

use std::io::{self, BufRead, Read};

/// The largest window, which is zstd's own limit too, and that of kernels' makers.
const WINDOW_LOG_MAX: u32 = 27;
/// What a dictionary of xz of that size costs, and what is held beside it.
const XZ_MEMORY_KIB: u32 = (1 << (WINDOW_LOG_MAX - 10)) + 1024;

/// Unpacks one frame of zstd.
pub fn unzstd(packed: impl BufRead) -> io::Result<impl Read> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(packed)?.single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    Ok(decoder)
}

/// Unpacks one stream of xz.
pub fn unxz(packed: impl Read) -> impl Read {
    lzma_rust2::XzReader::new_mem_limit(packed, false, XZ_MEMORY_KIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_that_is_too_large_is_refused() {
        let unpack = |window: u8| {
            // One block of four bytes as they are, the last.
            let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, window, 4 << 3 | 1, 0, 0];
            let frame = [&frame[..], b"text"].concat();
            let mut out = Vec::new();
            unzstd(frame.as_slice())?.read_to_end(&mut out).map(|_| out)
        };
        assert_eq!(unpack(0x88).unwrap(), b"text");
        for window in [0x89, 0xf0] {
            assert!(unpack(window).unwrap_err().to_string().contains("memory"));
        }
    }
}
