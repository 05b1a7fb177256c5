//! A driver for tests: guest memory, rings and registers, without KVM.
//!
//! Memory is 1 MiB. Queue N has its rings at `0x1000 * (N + 1)`; from 0x8000
//! on, memory is the test's.

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config as bits;
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Token, VirtioDevice};
use super::mmio::{Status, VirtioMmio};
use super::state::{RestoreError, VirtioState};
use super::{GuestMemory, feature};
use crate::bus::BusDevice;

/// The size of every queue.
pub const SIZE: u16 = 16;
/// The size of memory.
pub const MEMORY: usize = 1 << 20;

pub const AVAILABLE: u64 = 0x400;
pub const USED: u64 = 0x800;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A descriptor as it is written to the table.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn readable(addr: u64, len: u32) -> Self {
        Descriptor {
            addr,
            len,
            ..Default::default()
        }
    }

    pub fn writable(addr: u64, len: u32) -> Self {
        Descriptor {
            addr,
            len,
            flags: WRITE,
            ..Default::default()
        }
    }
}

/// A driver, and its device.
pub struct Driver {
    pub transport: VirtioMmio,
    sources: Epoll,
    /// Sources whose edges were seen and that were not served.
    ready: BTreeSet<Token>,
    pub memory: Arc<GuestMemory>,
    interrupt: EventFd,
    /// For each queue, the next free descriptor and the used entries seen.
    positions: Vec<(u16, u16)>,
}

impl Driver {
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, None)
    }

    /// With memory that another process could map.
    pub fn shared(device: Box<dyn VirtioDevice>) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY as u64).unwrap();
        Self::with_memory(device, Some(FileOffset::new(file, 0)))
    }

    fn with_memory(device: Box<dyn VirtioDevice>, file: Option<FileOffset>) -> Self {
        let ranges = [(GuestAddress(0), MEMORY, file)];
        let memory = Arc::new(GuestMemory::from_ranges_with_files(ranges).unwrap());
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let queues = device.queue_sizes().len();
        let transport =
            VirtioMmio::new(device, memory.clone(), interrupt.try_clone().unwrap()).unwrap();
        Driver {
            sources: watch(&transport),
            transport,
            ready: BTreeSet::new(),
            memory,
            interrupt,
            positions: vec![(0, 0); queues],
        }
    }

    /// What is saved of the device, which goes on.
    pub fn save(&mut self) -> VirtioState {
        self.transport.quiesce();
        self.transport.save().unwrap()
    }

    /// Puts another device in the place of this one, in a saved state. If it is refused,
    /// nothing changes.
    pub fn restore(
        &mut self,
        device: Box<dyn VirtioDevice>,
        state: VirtioState,
    ) -> Result<(), RestoreError> {
        let interrupt = self.interrupt.try_clone().unwrap();
        let transport = VirtioMmio::restore(device, self.memory.clone(), interrupt, state)?;
        self.sources = watch(&transport);
        self.ready.clear();
        self.transport = transport;
        Ok(())
    }

    pub fn write_register(&mut self, offset: u32, value: u32) {
        self.transport.write(offset.into(), &value.to_le_bytes());
    }

    pub fn read_register(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn status(&mut self) -> Status {
        Status::from_bits_retain(self.read_register(reg::VIRTIO_MMIO_STATUS))
    }

    pub fn add_status(&mut self, bits: Status) {
        let status = self.status() | bits;
        self.write_register(reg::VIRTIO_MMIO_STATUS, status.bits());
    }

    pub fn rings(queue: usize) -> u64 {
        0x1000 * (queue as u64 + 1)
    }

    /// Everything up to the activation.
    pub fn set_up(&mut self, features: u64) {
        self.add_status(Status::ACKNOWLEDGE);
        self.add_status(Status::DRIVER);
        let features = features | feature(bits::VIRTIO_F_VERSION_1);
        for half in 0..2 {
            self.write_register(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write_register(
                reg::VIRTIO_MMIO_DRIVER_FEATURES,
                (features >> (32 * half)) as u32,
            );
        }
        self.add_status(Status::FEATURES_OK);
        for queue in 0..self.positions.len() {
            self.set_up_queue(queue, Self::rings(queue));
        }
    }

    pub fn set_up_queue(&mut self, queue: usize, rings: u64) {
        self.write_register(reg::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
        self.write_register(reg::VIRTIO_MMIO_QUEUE_NUM, SIZE.into());
        for (register, address) in [
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, rings),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, rings + AVAILABLE),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, rings + USED),
        ] {
            self.write_register(register, address as u32);
            self.write_register(register + 4, (address >> 32) as u32);
        }
        self.write_register(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub fn start(&mut self, features: u64) {
        self.set_up(features);
        self.add_status(Status::DRIVER_OK);
        assert!(self.status().contains(Status::DRIVER_OK));
        assert!(!self.status().contains(Status::NEEDS_RESET));
    }

    pub fn reset(&mut self) {
        self.write_register(reg::VIRTIO_MMIO_STATUS, 0);
        for (queue, position) in self.positions.iter_mut().enumerate() {
            *position = (0, 0);
            let zeros = [0; 0xc00];
            let rings = GuestAddress(Self::rings(queue));
            self.memory.write_slice(&zeros, rings).unwrap();
        }
        self.interrupts();
    }

    /// Writes one descriptor to the table, as it is.
    pub fn describe(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&descriptor.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&descriptor.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&descriptor.next.to_le_bytes());
        self.write(Self::rings(queue) + u64::from(index) * 16, &bytes);
    }

    /// Makes a head available.
    pub fn offer(&self, queue: usize, head: u16) {
        let ring = GuestAddress(Self::rings(queue) + AVAILABLE);
        let index: u16 = self.memory.read_obj(GuestAddress(ring.0 + 2)).unwrap();
        let entry = GuestAddress(ring.0 + 4 + u64::from(index % SIZE) * 2);
        self.memory.write_obj(head, entry).unwrap();
        self.set_available_index(queue, index.wrapping_add(1));
    }

    pub fn set_available_index(&self, queue: usize, index: u16) {
        let address = GuestAddress(Self::rings(queue) + AVAILABLE + 2);
        self.memory.write_obj(index, address).unwrap();
    }

    /// Adds a chain, linked, and returns its head.
    pub fn add(&mut self, queue: usize, chain: &[Descriptor]) -> u16 {
        let head = self.positions[queue].0 % SIZE;
        for (offset, descriptor) in (0..).zip(chain) {
            let index = (head + offset) % SIZE;
            let mut descriptor = *descriptor;
            if usize::from(offset) + 1 < chain.len() {
                descriptor.flags |= NEXT;
                descriptor.next = (index + 1) % SIZE;
            }
            self.describe(queue, index, descriptor);
        }
        self.positions[queue].0 += chain.len() as u16;
        self.offer(queue, head);
        head
    }

    pub fn kick(&mut self, queue: usize) {
        self.transport.queue_notified(queue);
    }

    /// The used entries since the last call: head and length.
    pub fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let ring = Self::rings(queue) + USED;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut entries = Vec::new();
        while self.positions[queue].1 != index {
            let slot = u64::from(self.positions[queue].1 % SIZE);
            let entry = GuestAddress(ring + 4 + slot * 8);
            let head: u32 = self.memory.read_obj(entry).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(entry.0 + 4)).unwrap();
            entries.push((head as u16, len));
            self.positions[queue].1 = self.positions[queue].1.wrapping_add(1);
        }
        entries
    }

    /// How often the guest was interrupted since the last call.
    pub fn interrupts(&self) -> u64 {
        self.interrupt.read().unwrap_or(0)
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    /// Does what the event loop does at once: sources that are ready, and queues whose
    /// notification waits.
    pub fn process_pending(&mut self) {
        let mut events = [EpollEvent::default(); 8];
        let count = self.sources.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            self.transport.event_ready(event.data() as Token);
        }
        for queue in 0..self.positions.len() {
            if !self.transport.is_vhost_user() && self.transport.kicks()[queue].read().is_ok() {
                self.transport.queue_notified(queue);
            }
        }
    }

    /// Waits until a source is ready, and lets the device know of all that are.
    pub fn handle_event(&mut self) {
        self.handle_events(|_| true);
    }

    /// The same for some of the sources. They are watched on edges, as the event
    /// loop does.
    pub fn handle_events(&mut self, which: impl Fn(Token) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.ready.iter().any(|&token| which(token)) && Instant::now() < deadline {
            let mut events = [EpollEvent::default(); 8];
            // The kernel may interrupt it to complete an operation.
            let count = self.sources.wait(100, &mut events).unwrap_or(0);
            let tokens = events[..count].iter().map(|event| event.data() as Token);
            self.ready.extend(tokens);
        }
        let (ready, others) = self.ready.iter().partition(|&&token| which(token));
        self.ready = others;
        let ready: BTreeSet<Token> = ready;
        for token in ready {
            self.transport.event_ready(token);
        }
    }
}

/// Watches the sources of a device, as the event loop does.
fn watch(transport: &VirtioMmio) -> Epoll {
    let sources = Epoll::new().unwrap();
    for (token, fd) in transport.sources() {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, token.into());
        sources.ctl(ControlOperation::Add, fd, event).unwrap();
    }
    sources
}
