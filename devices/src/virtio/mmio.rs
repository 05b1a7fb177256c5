//! The memory-mapped transport, version 2 (virtio 1.2, 4.2).

use std::os::fd::RawFd;
use std::sync::Arc;

use bitflags::bitflags;
use virtio_bindings::virtio_config as bits;
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueState;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{DeviceId, NeedsReset, Token, VirtioDevice};
use super::interrupt::{Interrupt, InterruptLine, Interrupter};
use super::queues::Queues;
use super::registers::{CONFIG, RegisterPage, RegisterPages};
use super::state::{
    QueueSetup, RestoreError, SaveError, TransportState, VERSION as STATE_VERSION, VirtioState,
};
use super::{GuestMemory, feature};
use crate::bus::{BusDevice, SharedRegisters};
use crate::number::halves;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"MYFL");
/// The offset of the register that the driver writes a queue's index to.
pub const NOTIFY_OFFSET: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// The offset of the register by which the driver acknowledges interrupts.
pub const INTERRUPT_ACK_OFFSET: u64 = reg::VIRTIO_MMIO_INTERRUPT_ACK as u64;
/// What the driver acknowledges when queues, and nothing else, interrupted it.
///
/// Whether the transport hears of it does not matter: the status then says for good that
/// queues interrupted, and a driver copes with having nothing to take from them (virtio
/// 1.2, 2.7.7.3). So KVM may take these writes, which spares the way to this process.
pub const QUEUES_ACKNOWLEDGED: u32 = Interrupt::QUEUE.bits();
/// What the transport itself offers.
pub(super) const FEATURES: u64 = feature(bits::VIRTIO_F_VERSION_1)
    | feature(VIRTIO_RING_F_INDIRECT_DESC)
    | feature(VIRTIO_RING_F_EVENT_IDX);

bitflags! {
    /// Device status (virtio 1.2, 2.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Status: u32 {
        /// The driver saw the device.
        const ACKNOWLEDGE = bits::VIRTIO_CONFIG_S_ACKNOWLEDGE;
        /// It knows how to drive it.
        const DRIVER = bits::VIRTIO_CONFIG_S_DRIVER;
        /// It is ready.
        const DRIVER_OK = bits::VIRTIO_CONFIG_S_DRIVER_OK;
        /// Features are agreed on.
        const FEATURES_OK = bits::VIRTIO_CONFIG_S_FEATURES_OK;
        /// The device cannot go on.
        const NEEDS_RESET = bits::VIRTIO_CONFIG_S_NEEDS_RESET;
        /// The driver gave up.
        const FAILED = bits::VIRTIO_CONFIG_S_FAILED;
    }
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        QueueSetup {
            max_size,
            size: max_size,
            ..Default::default()
        }
    }

    fn state(&self, event_idx_enabled: bool) -> QueueState {
        QueueState {
            max_size: self.max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        }
    }
}

/// What the transport has counted since it was made.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    kicks: u64,
    chains: u64,
    faults: u64,
}

/// A device, and how the guest talks to it.
pub struct VirtioMmio {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemory>,
    interrupter: Arc<Interrupter>,
    kicks: Vec<EventFd>,
    /// All but what the driver reads of it is in [`VirtioMmio::page`].
    state: TransportState,
    page: Arc<RegisterPage>,
    /// There from the activation to the reset, or to the driver's first fault.
    active: Option<Queues>,
    counters: Counters,
}

impl VirtioMmio {
    /// A transport in reset. `interrupt` is the guest's.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        interrupt: impl InterruptLine + 'static,
    ) -> std::io::Result<Self> {
        VirtioMmio::with_registers(device, memory, interrupt, (&RegisterPages::new(1), 0))
    }

    /// The same, whose registers are in one of several pages.
    pub fn with_registers(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        interrupt: impl InterruptLine + 'static,
        (pages, index): (&RegisterPages, usize),
    ) -> std::io::Result<Self> {
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<Result<_, _>>()?;
        let page = RegisterPage::at(pages, index, device.hears_config_reads());
        let interrupter = Arc::new(Interrupter::new(page.clone(), interrupt));
        let mut transport = VirtioMmio {
            page,
            device,
            memory,
            interrupter,
            kicks,
            state: TransportState::default(),
            active: None,
            counters: Counters::default(),
        };
        transport.reset();
        Ok(transport)
    }

    /// For each queue, what the driver's notification signals.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Another process waits for notifications: they must not be taken from it.
    pub fn is_vhost_user(&self) -> bool {
        self.device.is_vhost_user()
    }

    /// The device's sources of events.
    pub fn sources(&self) -> Vec<(Token, RawFd)> {
        self.device.sources()
    }

    /// The registers that the driver reads without the device's lock.
    pub fn registers(&self) -> &Arc<RegisterPage> {
        &self.page
    }

    /// The kind of device.
    pub fn id(&self) -> DeviceId {
        self.device.id()
    }

    /// What was counted since the device was made, by name: the transport's
    /// own, then the device's.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let Counters {
            kicks,
            chains,
            faults,
        } = self.counters;
        let mut all = vec![
            ("notifications", kicks),
            ("chains", chains),
            ("interrupts", self.interrupter.raised()),
            ("driver_faults", faults),
        ];
        all.extend(self.device.counters());
        all
    }

    /// Finishes what the device has begun, or puts it back: see
    /// [`VirtioDevice::quiesce`]. It comes just before [`VirtioMmio::save`].
    pub fn quiesce(&mut self) {
        self.turn(None, |device, queues| device.quiesce(queues));
    }

    /// The driver has to reset the device, as it broke the rules: perhaps just now.
    pub fn is_broken(&self) -> bool {
        self.status().contains(Status::NEEDS_RESET)
    }

    /// What the guest can see of the device, the rings' positions included.
    pub fn save(&self) -> Result<VirtioState, SaveError> {
        Ok(VirtioState {
            version: STATE_VERSION,
            transport: self.transport_state(),
            device: self.device.save()?,
        })
    }

    /// A transport and its device as they were saved. What the guest was to be told it is
    /// told, once more if it knows.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        interrupt: impl InterruptLine + 'static,
        state: VirtioState,
    ) -> Result<Self, RestoreError> {
        let registers = (&RegisterPages::new(1), 0);
        VirtioMmio::restore_with_registers(device, memory, interrupt, registers, state)
    }

    /// The same, whose registers are in one of several pages.
    pub fn restore_with_registers(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        interrupt: impl InterruptLine + 'static,
        registers: (&RegisterPages, usize),
        state: VirtioState,
    ) -> Result<Self, RestoreError> {
        if state.version != STATE_VERSION {
            return Err(RestoreError::Version(state.version));
        }
        let host = |error: std::io::Error| RestoreError::Host(error.raw_os_error().unwrap_or(0));
        let transport = VirtioMmio::with_registers(device, memory, interrupt, registers);
        let mut transport = transport.map_err(host)?;
        transport.check(&state.transport)?;
        transport.state = state.transport;
        transport.page.raise(transport.state.interrupts);
        let status = transport.status();
        if status.contains(Status::DRIVER_OK) && !status.contains(Status::NEEDS_RESET) {
            let activated = transport.try_activate();
            let queues = activated.map_err(|NeedsReset(reason)| RestoreError::Mismatch(reason))?;
            transport.active = Some(queues);
        }
        transport.device.restore(state.device)?;
        if transport.active.is_some() {
            transport.kick_all();
        }
        transport.publish();
        if transport.page.interrupt_status() != 0 {
            transport.interrupter.repeat();
        }
        Ok(transport)
    }

    /// Whether registers can be as they are said to be.
    fn check(&self, state: &TransportState) -> Result<(), RestoreError> {
        let status = Status::from_bits(state.status)
            .ok_or(RestoreError::Mismatch("a bit of the status is not known"))?;
        let sizes = self.device.queue_sizes();
        let offered = state.queues.iter().map(|queue| &queue.max_size);
        let mismatch = if !offered.eq(sizes) {
            "its queues are not those of the device"
        } else if status.contains(Status::FEATURES_OK) && state.acked & !self.features() != 0 {
            "the driver agreed on features that the device does not have"
        } else if status.contains(Status::DRIVER_OK) && !status.contains(Status::FEATURES_OK) {
            "the driver runs without having agreed on features"
        } else if Interrupt::from_bits(state.interrupts).is_none() {
            "a bit of the interrupt status is not known"
        } else {
            return Ok(());
        };
        Err(RestoreError::Mismatch(mismatch))
    }

    fn transport_state(&self) -> TransportState {
        let mut state = self.state.clone();
        state.interrupts = self.page.interrupt_status();
        let live = self.active.iter().flat_map(Queues::states);
        for (setup, live) in state.queues.iter_mut().zip(live) {
            if let Some(live) = live {
                setup.next_available = live.next_avail;
                setup.next_used = live.next_used;
            }
        }
        state
    }

    /// Lets the device look at all its queues.
    fn kick_all(&self) {
        for kick in &self.kicks {
            // Only refuses when it is signalled already.
            let _ = kick.write(1);
        }
    }

    /// The driver notified a queue. The event is not read: it is watched on edges,
    /// and each notification is one.
    pub fn queue_notified(&mut self, queue: usize) {
        if self.is_vhost_user() {
            return;
        }
        self.counters.kicks += 1;
        self.turn(Some(queue), |device, queues| {
            device.process_queue(queue, queues)
        });
    }

    /// One of the device's sources is ready.
    pub fn event_ready(&mut self, token: Token) {
        self.turn(None, |device, queues| device.handle_event(token, queues));
    }

    /// Lets the device work, and tells the guest what came of it.
    fn turn(
        &mut self,
        queue: Option<usize>,
        work: impl FnOnce(&mut dyn VirtioDevice, &mut Queues) -> Result<(), NeedsReset>,
    ) {
        let Some(queues) = &mut self.active else {
            return;
        };
        queues.begin();
        let suppressed = queue.map_or(Ok(()), |queue| queues.suppress_notifications(queue));
        let worked = suppressed.and_then(|()| work(&mut *self.device, queues));
        let ended = worked.and_then(|()| queues.end());
        if queues.exhausted() {
            // Others first; then it goes on, with all its queues.
            for kick in &self.kicks {
                let _ = kick.write(1);
            }
        }
        self.counters.chains += queues.take_chains();
        if queues.take_config_changed() {
            self.state.config_generation = self.state.config_generation.wrapping_add(1);
            self.publish();
            self.interrupter.raise(Interrupt::CONFIG);
        }
        if let Err(error) = ended {
            self.needs_reset(error);
        }
    }

    fn needs_reset(&mut self, error: NeedsReset) {
        log::warn!("{:?} device: {error}", self.device.id());
        self.counters.faults += 1;
        self.state = self.transport_state();
        self.active = None;
        self.device.reset();
        self.state.status |= Status::NEEDS_RESET.bits();
        self.publish();
        if self.status().contains(Status::DRIVER_OK) {
            self.interrupter.raise(Interrupt::CONFIG);
        }
    }

    fn reset(&mut self) {
        self.active = None;
        self.device.reset();
        self.state = TransportState {
            // It must not go back: the driver may compare across a reset.
            config_generation: self.state.config_generation,
            queues: self
                .device
                .queue_sizes()
                .iter()
                .map(|&size| QueueSetup::new(size))
                .collect(),
            ..Default::default()
        };
        self.page.set(reg::VIRTIO_MMIO_INTERRUPT_STATUS, 0);
        self.publish();
    }

    /// Lets the driver read what is so now. The interrupt status is always so.
    fn publish(&self) {
        for offset in (0..reg::VIRTIO_MMIO_CONFIG).step_by(size_of::<u32>()) {
            if offset != reg::VIRTIO_MMIO_INTERRUPT_STATUS {
                self.page.set(offset, self.read_register(offset));
            }
        }
        self.page.set_config(self.device.config());
    }

    fn status(&self) -> Status {
        Status::from_bits_retain(self.state.status)
    }

    fn features(&self) -> u64 {
        match self.is_vhost_user() {
            true => self.device.features(),
            false => FEATURES | self.device.features(),
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let before = self.status();
        let mut after = before | Status::from_bits_truncate(value).difference(Status::NEEDS_RESET);
        let new = |bit| after.contains(bit) && !before.contains(bit);
        let (features_ok, driver_ok) = (new(Status::FEATURES_OK), new(Status::DRIVER_OK));
        if features_ok {
            let acked = self.state.acked;
            let sound = acked & !self.features() == 0
                && acked & feature(bits::VIRTIO_F_VERSION_1) != 0
                && after.contains(Status::DRIVER);
            after.set(Status::FEATURES_OK, sound);
        }
        if driver_ok && !after.contains(Status::FEATURES_OK) {
            after.remove(Status::DRIVER_OK);
        }
        self.state.status = after.bits();
        if driver_ok && after.contains(Status::DRIVER_OK) && !after.contains(Status::NEEDS_RESET) {
            self.activate();
        }
    }

    fn activate(&mut self) {
        match self.try_activate() {
            Ok(queues) => {
                self.active = Some(queues);
                // The driver may have added chains, and sources may have
                // become ready, before this.
                self.kick_all();
            }
            Err(error) => self.needs_reset(error),
        }
    }

    /// Checks the queues, and tells the device what was agreed on.
    fn try_activate(&mut self) -> Result<Queues, NeedsReset> {
        let acked = self.state.acked;
        let event_idx = acked & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
        let setups = self.state.queues.iter();
        let states: Vec<_> = setups.map(|setup| setup.state(event_idx)).collect();
        let queues = Queues::new(&self.memory, &states, &self.interrupter)?;
        self.device.activate(acked, &self.memory)?;
        if self.device.is_vhost_user() {
            self.device.start_backend(&queues.rings(&self.kicks)?)?;
        }
        Ok(queues)
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.state.queues.get(self.state.queue_select as usize)
    }

    /// The selected queue, while it may be changed.
    fn queue_mut(&mut self) -> Option<&mut QueueSetup> {
        if self.status().contains(Status::DRIVER_OK) {
            return None;
        }
        self.state.queues.get_mut(self.state.queue_select as usize)
    }

    fn read_register(&self, offset: u32) -> u32 {
        let half = |value: u64, select: u32| match (select, halves(value)) {
            (0, (low, _)) => low,
            (1, (_, high)) => high,
            _ => 0,
        };
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.id() as u32,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => {
                half(self.features(), self.state.device_features_select)
            }
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size.into()),
            reg::VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |queue| queue.ready.into()),
            reg::VIRTIO_MMIO_STATUS => self.state.status,
            // No shared memory: a length of all ones says so.
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.state.config_generation,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.state.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.state.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => {
                if !self.status().contains(Status::FEATURES_OK) {
                    let acked = &mut self.state.acked;
                    match self.state.driver_features_select {
                        0 => *acked = low(*acked),
                        1 => *acked = high(*acked),
                        _ => {}
                    }
                }
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => self.state.queue_select = value,
            // Normally taken by KVM, which signals the same descriptor.
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            reg::VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => {
                let Some(queue) = self.queue_mut() else {
                    return;
                };
                if offset == reg::VIRTIO_MMIO_QUEUE_READY {
                    queue.ready = value == 1;
                }
                if queue.ready {
                    return;
                }
                match offset {
                    reg::VIRTIO_MMIO_QUEUE_NUM => {
                        // A size that is not possible makes the queue unusable.
                        queue.size = u16::try_from(value).unwrap_or(0);
                    }
                    reg::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.descriptors = low(queue.descriptors),
                    reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.descriptors = high(queue.descriptors),
                    reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.available = low(queue.available),
                    reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.available = high(queue.available),
                    reg::VIRTIO_MMIO_QUEUE_USED_LOW => queue.used = low(queue.used),
                    reg::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.used = high(queue.used),
                    _ => {}
                }
            }
        }
    }
}

impl BusDevice for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if !self.page.read(offset, data) {
            self.page.copy(offset, data);
            self.device.config_read();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if self.page.write(offset, data) {
            return;
        }
        if let Some(start) = offset.checked_sub(CONFIG) {
            self.device.write_config(start, data);
        } else if let (Ok(offset), Ok(value)) = (u32::try_from(offset), data.try_into()) {
            self.write_register(offset, u32::from_le_bytes(value));
        }
        self.publish();
    }

    fn shared(&self) -> Option<Arc<dyn SharedRegisters>> {
        Some(self.page.clone())
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
