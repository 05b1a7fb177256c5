//! What the driver reads of a virtio-mmio transport: a page of memory.
//!
//! A read that leaves the guest for this process costs more than most of what it is for,
//! and a driver reads the interrupt status at each interrupt (virtio 1.2, 4.2.2). So all
//! that can be read lies in a page, which KVM can let the guest read by itself
//! (`KVM_MEM_READONLY`). Without that, reads are served from the page too, and wait for no
//! lock, as does the interrupts' acknowledgement.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio as reg;

use crate::bus::SharedRegisters;

/// The size of a register.
const WORD: usize = size_of::<u32>();
/// The number of registers in a page.
const WORDS: usize = 4096 / WORD;
/// Where the configuration space starts.
pub(super) const CONFIG: u64 = reg::VIRTIO_MMIO_CONFIG as u64;

#[repr(C, align(4096))]
struct Words([AtomicU32; WORDS]);

/// The pages of several devices' registers, one behind the other: KVM takes as long for one
/// page as for many in a row.
#[derive(Clone)]
pub struct RegisterPages(Arc<[Words]>);

impl RegisterPages {
    /// As many pages, of registers that are all zero.
    pub fn new(count: usize) -> Self {
        let zero = |_| Words([const { AtomicU32::new(0) }; WORDS]);
        RegisterPages((0..count).map(zero).collect())
    }
}

/// The registers, as the driver reads them.
pub struct RegisterPage {
    pages: RegisterPages,
    /// Which of the pages.
    index: usize,
    /// The device hears of reads of its configuration space.
    config_read_heard: bool,
}

impl RegisterPage {
    /// The length of a page in bytes.
    pub const SIZE: usize = size_of::<Words>();

    /// Registers in one of several pages.
    pub(super) fn at(pages: &RegisterPages, index: usize, config_read_heard: bool) -> Arc<Self> {
        Arc::new(RegisterPage {
            pages: pages.clone(),
            index,
            config_read_heard,
        })
    }

    /// Where the page starts: 4096 bytes, which stay as long as this does, and which only
    /// this changes. None if the device hears of reads: the guest must not do them by
    /// itself.
    pub fn address(&self) -> Option<*const u8> {
        let words = self.pages.0.get(self.index)?;
        (!self.config_read_heard).then_some(std::ptr::from_ref(words).cast())
    }

    /// Fills `data` with what the driver reads at an offset, which is any number.
    pub(super) fn copy(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if offset >= size_of::<Words>() {
            return;
        }
        for (at, byte) in (offset..).zip(data) {
            let word = self.word(at).map_or(0, |word| word.load(Ordering::Acquire));
            let bytes = word.to_ne_bytes();
            *byte = bytes.get(at % WORD).copied().unwrap_or(0);
        }
    }

    fn words(&self) -> &[AtomicU32] {
        let words = self.pages.0.get(self.index);
        words.map_or(&[], |words| &words.0)
    }

    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        self.words().get(offset / WORD)
    }

    /// Sets the register at an offset.
    pub(super) fn set(&self, offset: u32, value: u32) {
        if let Some(word) = self.word(offset as usize) {
            word.store(value.to_le(), Ordering::Release);
        }
    }

    /// Sets the configuration space.
    pub(super) fn set_config(&self, config: &[u8]) {
        let words = self
            .words()
            .iter()
            .skip(reg::VIRTIO_MMIO_CONFIG as usize / WORD);
        for (word, bytes) in words.zip(config.chunks(WORD)) {
            let mut value = [0; WORD];
            value
                .iter_mut()
                .zip(bytes)
                .for_each(|(to, from)| *to = *from);
            word.store(u32::from_ne_bytes(value), Ordering::Release);
        }
    }

    fn interrupts(&self) -> Option<&AtomicU32> {
        self.word(reg::VIRTIO_MMIO_INTERRUPT_STATUS as usize)
    }

    /// The interrupt status.
    pub(super) fn interrupt_status(&self) -> u32 {
        let status = self.interrupts();
        status.map_or(0, |status| u32::from_le(status.load(Ordering::Acquire)))
    }

    /// Adds bits to the interrupt status. What the driver is notified of was done before.
    pub(super) fn raise(&self, bits: u32) {
        if let Some(status) = self.interrupts() {
            status.fetch_or(bits.to_le(), Ordering::SeqCst);
        }
    }

    /// The driver takes bits off the interrupt status.
    fn acknowledge(&self, bits: u32) {
        if let Some(status) = self.interrupts() {
            status.fetch_and(!bits.to_le(), Ordering::SeqCst);
        }
    }
}

impl SharedRegisters for RegisterPage {
    fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        if self.config_read_heard && offset.saturating_add(data.len() as u64) > CONFIG {
            return false;
        }
        self.copy(offset, data);
        true
    }

    fn write(&self, offset: u64, data: &[u8]) -> bool {
        match <[u8; WORD]>::try_from(data) {
            Ok(value) if offset == u64::from(reg::VIRTIO_MMIO_INTERRUPT_ACK) => {
                self.acknowledge(u32::from_le_bytes(value));
                true
            }
            _ => false,
        }
    }
}
