//! A snapshot as one file.
//!
//! | length | holds |
//! | --- | --- |
//! | 8 | [`MAGIC`] |
//! | 2 | the version of this layout |
//! | 2 | 0 |
//! | 4 | the length of the manifest |
//! | | the manifest: JSON |
//! | 32 | SHA-256 of all before it |
//! | | the memory, the state, and each disk, in the manifest's order |
//!
//! A part is its blocks that are not all zeroes, in order: offset (8), length (4), content.
//! A block has 64 KiB, or what is left of the part. Behind the last is the part's length (8),
//! and 0 (4). Numbers are little-endian. The file ends with its last part.
//!
//! Such a file is as hostile as a guest: no more is read into memory than a manifest and a
//! block, nothing in it is a path, and what it takes on disk it brings along, byte by byte.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use mayfly_image::Digest;

use super::entry::{MANIFEST_MAX, ManifestError, parse_manifest};
use super::manifest::{Part, SNAPSHOT_VERSION, SnapshotManifest};
use super::parts::{BLOCK, BLOCK_SIZE, PartHasher, each_block, is_zero};

/// The first bytes of an export.
pub const MAGIC: [u8; 8] = *b"mayflySN";
/// The version of the layout.
const LAYOUT: u16 = 1;
const SUM: usize = 32;

/// Why an export is refused, or cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// It cannot be read or written.
    #[error("reading or writing it")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("it is no snapshot of mayfly's")]
    Magic,
    /// Another version of mayfly wrote it.
    #[error("it has layout {0}; this mayfly reads {LAYOUT}")]
    Layout(u16),
    /// It ends too early.
    #[error("it is incomplete")]
    Incomplete,
    /// A digest differs, or it was not written so.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// Its manifest is refused.
    #[error("{0}")]
    Manifest(#[from] ManifestError),
    /// What its manifest says is impossible.
    #[error("{0}")]
    Impossible(String),
    /// The file that a part goes into cannot be written: the disk may be full.
    #[error("writing the snapshot")]
    Write(#[source] io::Error),
}

/// Writes a snapshot whose files are those of its manifest, in its order.
pub fn write(
    manifest: &SnapshotManifest,
    files: &[&File],
    output: &mut dyn Write,
) -> Result<(), ExportError> {
    let text = serde_json::to_vec(manifest).map_err(ManifestError::Json)?;
    let len = u32::try_from(text.len()).map_err(|_| ManifestError::TooLong)?;
    let mut head = MAGIC.to_vec();
    head.extend(LAYOUT.to_le_bytes());
    head.extend([0; 2]);
    head.extend(len.to_le_bytes());
    head.extend(text);
    output.write_all(&head)?;
    output.write_all(Digest::of(&head).bytes())?;
    for ((name, part), file) in manifest.parts().iter().zip(files) {
        let mut hasher = PartHasher::new();
        each_block(file, part.bytes, |offset, block| {
            hasher.block(offset, block);
            // A block is no longer than 64 KiB.
            write_block(output, offset, block)
        })?;
        write_block(output, part.bytes, &[])?;
        if hasher.finish(part.bytes) != part.sha256 {
            return Err(damaged(name));
        }
    }
    Ok(output.flush()?)
}

fn write_block(output: &mut dyn Write, offset: u64, block: &[u8]) -> Result<(), ExportError> {
    let len = u32::try_from(block.len()).unwrap_or(u32::MAX);
    output.write_all(&offset.to_le_bytes())?;
    output.write_all(&len.to_le_bytes())?;
    Ok(output.write_all(block)?)
}

fn damaged(part: &str) -> ExportError {
    ExportError::Damaged(format!("the SHA-256 of its {part} is another"))
}

/// Reads the manifest that an export begins with, as far as it can be true.
pub fn read_manifest(input: &mut dyn Read) -> Result<SnapshotManifest, ExportError> {
    let mut head = vec![0; 16];
    fill(input, &mut head)?;
    if !head.starts_with(&MAGIC) {
        return Err(ExportError::Magic);
    }
    let mut numbers = head.get(8..).unwrap_or_default();
    let layout: u16 = u16::from_le_bytes(take(&mut numbers)?);
    if layout != LAYOUT {
        return Err(ExportError::Layout(layout));
    }
    if take(&mut numbers)? != [0; 2] {
        return Err(ExportError::Damaged("its header is another".into()));
    }
    let len = u64::from(u32::from_le_bytes(take(&mut numbers)?));
    if len > MANIFEST_MAX {
        return Err(ManifestError::TooLong.into());
    }
    // Memory is taken as bytes come.
    let taken = input.take(len).read_to_end(&mut head)?;
    if u64::try_from(taken).ok() != Some(len) {
        return Err(ExportError::Incomplete);
    }
    let mut sum = [0; SUM];
    fill(input, &mut sum)?;
    if Digest::of(&head).bytes() != &sum {
        return Err(damaged("manifest"));
    }
    let text = head.get(16..).unwrap_or_default();
    let manifest: SnapshotManifest = parse_manifest(text, SNAPSHOT_VERSION)?;
    manifest.check().map_err(ExportError::Impossible)?;
    Ok(manifest)
}

/// Reads the next part into an empty file, and checks it.
pub fn read_part(
    input: &mut dyn Read,
    name: &str,
    part: Part,
    file: &File,
) -> Result<(), ExportError> {
    let set_len = |len| file.set_len(len).map_err(ExportError::Write);
    let write = |block: &[u8], offset| file.write_all_at(block, offset).map_err(ExportError::Write);
    set_len(part.bytes)?;
    blocks(input, name, part, write)
}

/// Reads the next part, and checks all of it: each block is where one can be.
fn blocks(
    input: &mut dyn Read,
    name: &str,
    part: Part,
    mut write: impl FnMut(&[u8], u64) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let mut buffer = vec![0; BLOCK_SIZE];
    let mut hasher = PartHasher::new();
    let mut next = 0;
    loop {
        let mut header = [0; 12];
        fill(input, &mut header)?;
        let mut numbers = &header[..];
        let offset = u64::from_le_bytes(take(&mut numbers)?);
        let len = u64::from(u32::from_le_bytes(take(&mut numbers)?));
        if (offset, len) == (part.bytes, 0) {
            break;
        }
        let possible = offset >= next && offset < part.bytes && offset.is_multiple_of(BLOCK);
        if !possible || len != BLOCK.min(part.bytes.saturating_sub(offset)) {
            return Err(misplaced(name));
        }
        let size = usize::try_from(len).unwrap_or(0);
        let block = buffer.get_mut(..size).ok_or_else(|| misplaced(name))?;
        fill(input, block)?;
        if is_zero(block) {
            return Err(misplaced(name));
        }
        hasher.block(offset, block);
        write(block, offset)?;
        next = offset.saturating_add(BLOCK);
    }
    match hasher.finish(part.bytes) == part.sha256 {
        true => Ok(()),
        false => Err(damaged(name)),
    }
}

fn misplaced(part: &str) -> ExportError {
    ExportError::Damaged(format!("its {part} has a block that it cannot have"))
}

/// The end of an export: nothing follows.
pub fn read_end(input: &mut dyn Read) -> Result<(), ExportError> {
    match input.take(1).read_to_end(&mut Vec::new())? {
        0 => Ok(()),
        _ => Err(ExportError::Damaged("it goes on behind its end".into())),
    }
}

/// Reads and checks all of an export, and keeps nothing but its manifest.
pub fn parse(mut bytes: &[u8]) -> Result<SnapshotManifest, ExportError> {
    let input: &mut dyn Read = &mut bytes;
    let manifest = read_manifest(input)?;
    for (name, part) in manifest.parts() {
        blocks(input, &name, part, |_, _| Ok(()))?;
    }
    read_end(input)?;
    Ok(manifest)
}

fn fill(input: &mut dyn Read, buffer: &mut [u8]) -> Result<(), ExportError> {
    input
        .read_exact(buffer)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ExportError::Incomplete,
            _ => ExportError::Io(error),
        })
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], ExportError> {
    let (taken, rest) = bytes.split_first_chunk().ok_or(ExportError::Incomplete)?;
    *bytes = rest;
    Ok(*taken)
}
