//! Packets of the socket device (virtio 1.2, 5.10.6).

use bitflags::bitflags;

/// `struct virtio_vsock_hdr`.
pub const HEADER: usize = 44;
/// The host's context identifier (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;
/// The type of a stream's packets.
pub const STREAM: u16 = 1;
/// Stands for any port, and is none.
pub const PORT_ANY: u32 = u32::MAX;

/// The operation of a packet (virtio 1.2, 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts it.
    Response = 2,
    /// Refuses or breaks it.
    Reset = 3,
    /// Ends one or both directions.
    Shutdown = 4,
    /// Carries bytes.
    Data = 5,
    /// Tells the sender's credit.
    CreditUpdate = 6,
    /// Asks for the receiver's credit.
    CreditRequest = 7,
}

impl Op {
    /// The operation with a number.
    pub fn new(number: u16) -> Option<Self> {
        [
            Op::Request,
            Op::Response,
            Op::Reset,
            Op::Shutdown,
            Op::Data,
            Op::CreditUpdate,
            Op::CreditRequest,
        ]
        .into_iter()
        .find(|&op| op as u16 == number)
    }
}

bitflags! {
    /// What the sender of [`Op::Shutdown`] will not do any more.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Shutdown: u32 {
        /// The sender will receive no more.
        const RECEIVE = 1;
        /// The sender will send no more.
        const SEND = 2;
    }
}

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The context ID of the sender.
    pub src_cid: u64,
    /// The context ID of the receiver.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// The bytes behind the header.
    pub len: u32,
    /// [`STREAM`].
    pub kind: u16,
    /// An [`Op`].
    pub op: u16,
    /// [`Shutdown`].
    pub flags: u32,
    /// The size of the sender's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// How much it has passed on since the connection began; it wraps around.
    pub fwd_cnt: u32,
}

/// Takes the first bytes off.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((first, others)) => {
            *rest = others;
            *first
        }
        None => [0; N],
    }
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let rest = &mut bytes.as_slice();
        Header {
            src_cid: u64::from_le_bytes(take(rest)),
            dst_cid: u64::from_le_bytes(take(rest)),
            src_port: u32::from_le_bytes(take(rest)),
            dst_port: u32::from_le_bytes(take(rest)),
            len: u32::from_le_bytes(take(rest)),
            kind: u16::from_le_bytes(take(rest)),
            op: u16::from_le_bytes(take(rest)),
            flags: u32::from_le_bytes(take(rest)),
            buf_alloc: u32::from_le_bytes(take(rest)),
            fwd_cnt: u32::from_le_bytes(take(rest)),
        }
    }

    /// The header as it is written.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let all = fields.into_iter().flatten();
        for (target, source) in bytes.iter_mut().zip(all) {
            *target = *source;
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let bytes: [u8; HEADER] = std::array::from_fn(|index| index as u8);
        let header = Header::parse(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!((header.dst_port, header.len), (0x1716_1514, 0x1b1a_1918));
        assert_eq!((header.kind, header.op), (0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.bytes(), bytes);
    }

    #[test]
    fn operations_have_their_numbers() {
        assert_eq!(Op::new(5), Some(Op::Data));
        for number in [0, 8, u16::MAX] {
            assert_eq!(Op::new(number), None);
        }
    }
}
