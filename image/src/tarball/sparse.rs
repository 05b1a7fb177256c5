//! Files with holes, in the four ways that archives write them.

use std::io::{self, Read};

use tar::Header;

use super::block::BLOCK;
use super::decimal::decimal;
use super::error::ArchiveError;

/// The most pieces of a sparse file: only a hostile one has more.
pub const PIECES_MAX: usize = 1 << 20;
/// Holes that are smaller are written as zeroes.
pub const HOLE_MIN: u64 = 64 << 10;
const BAD: ArchiveError = ArchiveError::Malformed("a map of a file's holes");

/// What extended headers say of holes.
#[derive(Debug, Default)]
pub struct Hints {
    major: Option<u32>,
    size: Option<u64>,
    /// The file's own name.
    pub name: Option<Vec<u8>>,
    numbers: Vec<u64>,
    has_map: bool,
}

impl Hints {
    /// Takes a record whose key starts with `GNU.sparse.`.
    pub fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), ArchiveError> {
        match key {
            b"GNU.sparse.major" => self.major = Some(decimal(value).ok_or(BAD)?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.size = Some(decimal(value).ok_or(BAD)?);
            }
            b"GNU.sparse.name" => self.name = Some(value.to_vec()),
            b"GNU.sparse.numblocks" => self.has_map = true,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.number(value)?,
            b"GNU.sparse.map" => {
                self.has_map = true;
                if !value.is_empty() {
                    value
                        .split(|byte| *byte == b',')
                        .try_for_each(|number| self.number(number))?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn number(&mut self, text: &[u8]) -> Result<(), ArchiveError> {
        if self.numbers.len() >= PIECES_MAX {
            return Err(BAD);
        }
        self.numbers.push(decimal(text).ok_or(BAD)?);
        Ok(())
    }

    /// The map, if there are holes; the member's data start with it in format 1.
    pub fn map(&mut self, data: &mut impl Read) -> Result<Option<Map>, ArchiveError> {
        let Some(size) = self.size else {
            return Ok(None);
        };
        if self.major == Some(1) {
            let pieces = pieces_in(data)?;
            return Ok(Some(Map { size, pieces }));
        }
        if !self.has_map {
            return Ok(None);
        }
        let pieces = self.numbers.chunks(2).map(|pair| match pair {
            [offset, len] => Ok((*offset, *len)),
            _ => Err(BAD),
        });
        let pieces = pieces.collect::<Result<_, _>>()?;
        Ok(Some(Map { size, pieces }))
    }
}

/// Format 1: lines of numbers, up to the end of a block.
fn pieces_in(data: &mut impl Read) -> Result<Vec<(u64, u64)>, ArchiveError> {
    let mut block = Vec::new();
    let mut number = || -> Result<u64, ArchiveError> {
        let mut digits = Vec::new();
        loop {
            if block.is_empty() {
                let mut next = [0; BLOCK];
                data.read_exact(&mut next)
                    .map_err(|_| ArchiveError::Truncated)?;
                block = next.to_vec();
                block.reverse();
            }
            match block.pop() {
                Some(b'\n') => return decimal(&digits).filter(|_| !digits.is_empty()).ok_or(BAD),
                Some(digit) if digits.len() < 20 => digits.push(digit),
                _ => return Err(BAD),
            }
        }
    };
    let count = number()?;
    if count > PIECES_MAX as u64 {
        return Err(BAD);
    }
    let mut pieces = Vec::new();
    for _ in 0..count {
        pieces.push((number()?, number()?));
    }
    Ok(pieces)
}

/// Where a file's data are: `(offset, length)`, in order.
#[derive(Debug)]
pub struct Map {
    size: u64,
    pieces: Vec<(u64, u64)>,
}

impl Map {
    /// The map in GNU's old header, and in the blocks behind it.
    pub fn old(header: &Header, input: &mut impl Read) -> Result<Self, ArchiveError> {
        let gnu = header.as_gnu().ok_or(BAD)?;
        let mut pieces = Vec::new();
        let mut push = |piece: &tar::GnuSparseHeader| -> Result<(), ArchiveError> {
            if !piece.is_empty() {
                if pieces.len() >= PIECES_MAX {
                    return Err(BAD);
                }
                pieces.push((
                    piece.offset().map_err(|_| BAD)?,
                    piece.length().map_err(|_| BAD)?,
                ));
            }
            Ok(())
        };
        gnu.sparse.iter().try_for_each(&mut push)?;
        let mut more = gnu.is_extended();
        while more {
            let mut next = tar::GnuExtSparseHeader::new();
            input
                .read_exact(next.as_mut_bytes())
                .map_err(|_| ArchiveError::Truncated)?;
            next.sparse().iter().try_for_each(&mut push)?;
            more = next.is_extended();
        }
        let size = gnu.real_size().map_err(|_| BAD)?;
        Ok(Map { size, pieces })
    }

    /// The file's length.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Refuses what overlaps, or does not make up the stored bytes.
    pub fn check(&self, stored: u64) -> Result<(), ArchiveError> {
        let mut end = 0_u64;
        let mut sum = 0_u64;
        for (offset, len) in &self.pieces {
            if *offset < end {
                return Err(BAD);
            }
            end = offset.checked_add(*len).ok_or(BAD)?;
            sum = sum.checked_add(*len).ok_or(BAD)?;
        }
        match end <= self.size && sum == stored {
            true => Ok(()),
            false => Err(BAD),
        }
    }

    /// What comes at a position: `(data, length)`; a length of zero at the end.
    fn at(&self, position: u64) -> (bool, u64) {
        let index = self
            .pieces
            .partition_point(|(offset, len)| offset.saturating_add(*len) <= position);
        match self.pieces.get(index) {
            Some((offset, len)) if *offset <= position => {
                (true, len.saturating_sub(position.saturating_sub(*offset)))
            }
            Some((offset, _)) => (false, offset.saturating_sub(position)),
            None => (false, self.size.saturating_sub(position)),
        }
    }

    /// Reads the file at a position; the stored bytes come from `input`.
    pub fn read(
        &self,
        position: u64,
        input: &mut impl Read,
        buffer: &mut [u8],
    ) -> io::Result<usize> {
        let (data, left) = self.at(position);
        let count = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let buffer = buffer.get_mut(..count).unwrap_or_default();
        match data {
            true => input.read(buffer),
            false => {
                buffer.fill(0);
                Ok(count)
            }
        }
    }
}
