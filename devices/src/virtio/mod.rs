//! Virtio devices (virtio 1.2), and the transport that the guest finds them by.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
mod device_id;
pub mod fs;
pub mod interrupt;
pub mod mmio;
mod needs_reset;
pub mod net;
pub mod queues;
pub mod registers;
pub mod rng;
mod round_robin;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod transfer;
pub mod vsock;

/// The guest's memory.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// A feature bit as a mask.
pub const fn feature(bit: u32) -> u64 {
    1 << bit
}
