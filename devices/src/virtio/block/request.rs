//! A block request: hostile bytes become a checked value (virtio 1.2, 5.2.6).

#![forbid(unsafe_code)]

use virtio_bindings::virtio_blk as spec;

use crate::virtio::chain::{Buffer, Chain};
use crate::virtio::device::NeedsReset;

/// What sectors are counted in, in bytes.
pub const SECTOR: u64 = 512;
const HEADER: usize = 16;
const STATUS: usize = 1;
/// One segment of a discard or write-zeroes request.
const SEGMENT: usize = 16;
const SEGMENT_UNMAP: u32 = 1;

/// How a request ended (`VIRTIO_BLK_S_OK` and so on).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or wrong.
    IoError = 1,
    /// Not known.
    Unsupported = 2,
}

/// What a request asks for; offsets and lengths are bytes within the disk.
#[derive(Debug)]
pub enum Action {
    /// Read to the buffer.
    Read { offset: u64, data: Buffer },
    /// Write from the buffer.
    Write { offset: u64, data: Buffer },
    /// Make all completed writes durable.
    Flush,
    /// Tell the disk's identifier.
    GetId { data: Buffer },
    /// The range's content does not matter any more.
    Discard { offset: u64, len: u64 },
    /// The range shall read as zeroes.
    WriteZeroes { offset: u64, len: u64, unmap: bool },
    /// Nothing: the request fails.
    Refuse(Status),
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// Names the chain.
    pub head: u16,
    /// What to do.
    pub action: Action,
    status: Buffer,
}

/// The most data of a request: Linux sends 1280 KiB by default. Whoever resets
/// the device waits for all that is in flight.
const DATA_MAX: usize = 8 << 20;

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The disk's size in sectors.
    pub sectors: u64,
    /// The disk may not be written.
    pub read_only: bool,
    /// The longest discard, in sectors.
    pub discard_sectors: u32,
    /// The longest write-zeroes, in sectors.
    pub zeroes_sectors: u32,
}

impl Request {
    /// Reads a request once. A chain that has no room for the status is a
    /// fault of the driver; any other mistake just fails the request.
    pub fn parse(chain: &Chain, limits: Limits) -> Result<Self, NeedsReset> {
        let mut header = [0; HEADER];
        if chain.readable.read(&mut header) < HEADER {
            return Err(NeedsReset("a block request has no header"));
        }
        let Some(data_len) = chain.writable.len().checked_sub(STATUS) else {
            return Err(NeedsReset("a block request has no room for its status"));
        };
        let (input, status) = chain.writable.split_at(data_len);
        let (_, output) = chain.readable.split_at(HEADER);
        let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = header;
        let [_, _, _, _, _, _, _, _, sector @ ..] = header;
        let action = action(
            u32::from_le_bytes(kind),
            u64::from_le_bytes(sector),
            input,
            output,
            limits,
        );
        Ok(Request {
            head: chain.head,
            action: action.unwrap_or_else(Action::Refuse),
            status,
        })
    }

    /// How many bytes it moves, as limits count: a discard moves none.
    pub fn moved(&self) -> u64 {
        match &self.action {
            Action::Read { data, .. } | Action::Write { data, .. } => data.len() as u64,
            Action::WriteZeroes { len, .. } => *len,
            Action::Flush | Action::GetId { .. } | Action::Discard { .. } | Action::Refuse(_) => 0,
        }
    }

    /// Writes the status to the chain.
    pub fn finish(&self, status: Status) {
        self.status.write(&[status as u8]);
    }
}

fn action(
    kind: u32,
    sector: u64,
    input: Buffer,
    output: Buffer,
    limits: Limits,
) -> Result<Action, Status> {
    let writable = || match limits.read_only {
        true => Err(Status::IoError),
        false => Ok(()),
    };
    if input.len().max(output.len()) > DATA_MAX {
        return Err(Status::IoError);
    }
    match kind {
        spec::VIRTIO_BLK_T_IN => Ok(Action::Read {
            offset: range(sector, input.len() as u64, limits.sectors)?,
            data: input,
        }),
        spec::VIRTIO_BLK_T_OUT => {
            writable()?;
            Ok(Action::Write {
                offset: range(sector, output.len() as u64, limits.sectors)?,
                data: output,
            })
        }
        spec::VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
        spec::VIRTIO_BLK_T_GET_ID => Ok(Action::GetId { data: input }),
        spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES => {
            writable()?;
            let (sector, sectors, flags) = segment(&output)?;
            let zeroes = kind == spec::VIRTIO_BLK_T_WRITE_ZEROES;
            let (longest, known) = match zeroes {
                true => (limits.zeroes_sectors, SEGMENT_UNMAP),
                false => (limits.discard_sectors, 0),
            };
            if flags & !known != 0 {
                return Err(Status::Unsupported);
            }
            if sectors > longest {
                return Err(Status::IoError);
            }
            let len = u64::from(sectors) * SECTOR;
            let offset = range(sector, len, limits.sectors)?;
            Ok(match zeroes {
                true => Action::WriteZeroes {
                    offset,
                    len,
                    unmap: flags & SEGMENT_UNMAP != 0,
                },
                false => Action::Discard { offset, len },
            })
        }
        _ => Err(Status::Unsupported),
    }
}

/// The offset of a range of the disk, in bytes.
fn range(sector: u64, len: u64, sectors: u64) -> Result<u64, Status> {
    let end = sector.checked_add(len / SECTOR);
    match end {
        Some(end) if len.is_multiple_of(SECTOR) && len > 0 && end <= sectors => Ok(sector * SECTOR),
        _ => Err(Status::IoError),
    }
}

/// The only segment that a request may have, as the device's limits say.
fn segment(data: &Buffer) -> Result<(u64, u32, u32), Status> {
    let mut bytes = [0; SEGMENT];
    if data.len() != SEGMENT || data.read(&mut bytes) != SEGMENT {
        return Err(Status::Unsupported);
    }
    let [sector @ .., _, _, _, _, _, _, _, _] = bytes;
    let [_, _, _, _, _, _, _, _, sectors @ .., _, _, _, _] = bytes;
    let [_, _, _, _, _, _, _, _, _, _, _, _, flags @ ..] = bytes;
    Ok((
        u64::from_le_bytes(sector),
        u32::from_le_bytes(sectors),
        u32::from_le_bytes(flags),
    ))
}
