//! A 16550A serial port (National Semiconductor PC16550D data sheet).
//!
//! What the guest sends waits in a bounded ring for the event loop to pass on;
//! while the ring is full the transmitter says that it is busy, so that a slow
//! reader slows the guest down and costs no memory.

use std::collections::VecDeque;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::char_device::CharDevice;

/// How much output waits at most, in bytes.
const OUTPUT_MAX: usize = 64 << 10;
/// A driver that finds the transmitter empty sends that much without looking
/// again: the transmit FIFO of a 16550.
const TRANSMIT_FIFO: usize = 16;
/// How much input waits at most, in bytes: the hardware's FIFO is 16.
const INPUT_MAX: usize = 64;

// Offsets; the first two change their meaning with LCR's top bit.
const DATA: u64 = 0; // RBR, THR; DLL
const IER: u64 = 1; // IER; DLM
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IIR_NONE: u8 = 0x01;
const IIR_THRE: u8 = 0x02;
const IIR_DATA: u8 = 0x04;
const IIR_FIFO_ENABLED: u8 = 0xc0;
const LCR_DIVISOR_LATCH: u8 = 0x80;
/// 8 bits, no parity, 1 stop bit.
const LCR_DEFAULT: u8 = 0x03;
/// 9,600 baud.
const DIVISOR_DEFAULT: u16 = 12;

bitflags! {
    /// Interrupt enable register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Ier: u8 {
        const DATA = 1 << 0;
        const THRE = 1 << 1;
        const LINE = 1 << 2;
        const MODEM = 1 << 3;
    }

    /// FIFO control register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Fcr: u8 {
        const ENABLE = 1 << 0;
        const CLEAR_INPUT = 1 << 1;
    }

    /// Modem control register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Mcr: u8 {
        const DTR = 1 << 0;
        const RTS = 1 << 1;
        const OUT1 = 1 << 2;
        const OUT2 = 1 << 3;
        const LOOP = 1 << 4;
    }

    /// Line status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Lsr: u8 {
        const DATA = 1 << 0;
        const THR_EMPTY = 1 << 5;
        const IDLE = 1 << 6;
    }

    /// Modem status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Msr: u8 {
        const CTS = 1 << 4;
        const DSR = 1 << 5;
        const RI = 1 << 6;
        const DCD = 1 << 7;
    }
}

/// What the guest can see of the port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    ier: u8,
    fifo: bool,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: u16,
    /// The transmitter became empty, and the guest has not noticed yet.
    thre_pending: bool,
    /// An interrupt is being signalled.
    raised: bool,
    input: VecDeque<u8>,
    output: VecDeque<u8>,
}

impl Default for SerialState {
    fn default() -> Self {
        SerialState {
            ier: 0,
            fifo: false,
            lcr: LCR_DEFAULT,
            mcr: Mcr::OUT2.bits(),
            scr: 0,
            divisor: DIVISOR_DEFAULT,
            thre_pending: false,
            raised: false,
            input: VecDeque::new(),
            output: VecDeque::new(),
        }
    }
}

/// The device.
pub struct Serial {
    state: SerialState,
    interrupt: EventFd,
    host_event: EventFd,
}

impl Serial {
    /// A port in the given state. `interrupt` is signalled for the guest, on a
    /// rising edge; `host_event` when there is output after there was none, or
    /// there is room for input after there was
    /// none.
    pub fn new(state: SerialState, interrupt: EventFd, host_event: EventFd) -> Self {
        if state.raised {
            // It may have been on its way when the state was saved; one too many is none.
            signal(&interrupt);
        }
        Serial {
            state,
            interrupt,
            host_event,
        }
    }

    /// The guest-visible state.
    pub fn save(&self) -> SerialState {
        self.state.clone()
    }

    /// The guest wants input. Linux enables all interrupts for a moment when it
    /// finds out which UART this is.
    fn listening(&self) -> bool {
        let enabled = Ier::from_bits_retain(self.state.ier);
        enabled.contains(Ier::DATA) && enabled != Ier::all()
    }

    fn fifo_room(&self) -> usize {
        INPUT_MAX.saturating_sub(self.state.input.len())
    }

    /// There is no room for a FIFO's worth of output.
    fn busy(&self) -> bool {
        self.state.output.len() > OUTPUT_MAX - TRANSMIT_FIFO
    }

    fn transmit(&mut self, byte: u8) {
        if Mcr::from_bits_retain(self.state.mcr).contains(Mcr::LOOP) {
            if self.fifo_room() > 0 {
                self.state.input.push_back(byte);
            }
        } else if self.state.output.len() < OUTPUT_MAX {
            if self.state.output.is_empty() {
                signal(&self.host_event);
            }
            self.state.output.push_back(byte);
        } // else lost: the guest was told to wait
        self.state.thre_pending = !self.busy();
    }

    fn receive(&mut self) -> u8 {
        let was_full = self.fifo_room() == 0;
        let byte = self.state.input.pop_front().unwrap_or(0);
        if was_full {
            signal(&self.host_event);
        }
        byte
    }

    /// The interrupt with the highest priority that is enabled and pending.
    fn pending(&self) -> u8 {
        let enabled = Ier::from_bits_retain(self.state.ier);
        if enabled.contains(Ier::DATA) && !self.state.input.is_empty() {
            IIR_DATA
        } else if enabled.contains(Ier::THRE) && self.state.thre_pending {
            IIR_THRE
        } else {
            IIR_NONE
        }
    }

    fn update_interrupt(&mut self) {
        let pending = self.pending() != IIR_NONE;
        if pending && !self.state.raised {
            signal(&self.interrupt);
        }
        self.state.raised = pending;
    }

    fn line_status(&self) -> Lsr {
        let mut status = Lsr::empty();
        status.set(Lsr::DATA, !self.state.input.is_empty());
        status.set(Lsr::THR_EMPTY | Lsr::IDLE, !self.busy());
        status
    }

    fn modem_status(&self) -> Msr {
        let control = Mcr::from_bits_retain(self.state.mcr);
        if !control.contains(Mcr::LOOP) {
            return Msr::DCD | Msr::DSR | Msr::CTS;
        }
        let mut status = Msr::empty();
        status.set(Msr::CTS, control.contains(Mcr::RTS));
        status.set(Msr::DSR, control.contains(Mcr::DTR));
        status.set(Msr::RI, control.contains(Mcr::OUT1));
        status.set(Msr::DCD, control.contains(Mcr::OUT2));
        status
    }

    fn divisor_latch(&self) -> bool {
        self.state.lcr & LCR_DIVISOR_LATCH != 0
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let [low, high] = self.state.divisor.to_le_bytes();
        match offset {
            DATA if self.divisor_latch() => low,
            DATA => self.receive(),
            IER if self.divisor_latch() => high,
            IER => self.state.ier,
            IIR_FCR => {
                let pending = self.pending();
                if pending == IIR_THRE {
                    self.state.thre_pending = false;
                }
                pending | if self.state.fifo { IIR_FIFO_ENABLED } else { 0 }
            }
            LCR => self.state.lcr,
            MCR => self.state.mcr,
            LSR => self.line_status().bits(),
            MSR => self.modem_status().bits(),
            SCR => self.state.scr,
            _ => u8::MAX,
        }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        let [low, high] = self.state.divisor.to_le_bytes();
        match offset {
            DATA if self.divisor_latch() => {
                self.state.divisor = u16::from_le_bytes([value, high]);
            }
            DATA => self.transmit(value),
            IER if self.divisor_latch() => {
                self.state.divisor = u16::from_le_bytes([low, value]);
            }
            IER => {
                let before = Ier::from_bits_retain(self.state.ier);
                let listened = self.listening();
                let after = Ier::from_bits_truncate(value);
                self.state.ier = after.bits();
                if after.difference(before).contains(Ier::THRE) {
                    self.state.thre_pending = !self.busy();
                }
                if self.listening() && !listened {
                    signal(&self.host_event);
                }
            }
            IIR_FCR => {
                let control = Fcr::from_bits_truncate(value);
                self.state.fifo = control.contains(Fcr::ENABLE);
                if control.contains(Fcr::CLEAR_INPUT) {
                    if self.fifo_room() == 0 {
                        signal(&self.host_event);
                    }
                    self.state.input.clear();
                }
            }
            LCR => self.state.lcr = value,
            MCR => self.state.mcr = Mcr::from_bits_truncate(value).bits(),
            SCR => self.state.scr = value,
            _ => {}
        }
    }
}

impl CharDevice for Serial {
    fn output(&self) -> &[u8] {
        self.state.output.as_slices().0
    }

    fn output_done(&mut self, count: usize) {
        let was_busy = self.busy();
        let count = count.min(self.state.output.len());
        self.state.output.drain(..count);
        if self.state.output.is_empty() {
            // A burst should not hold its memory for ever.
            self.state.output = VecDeque::new();
        }
        if was_busy && !self.busy() {
            self.state.thre_pending = true;
            self.update_interrupt();
        }
    }

    /// Linux' driver clears the FIFO when it starts to listen.
    fn input_room(&self) -> usize {
        if self.listening() {
            self.fifo_room()
        } else {
            0
        }
    }

    fn input(&mut self, data: &[u8]) {
        let room = self.input_room();
        self.state.input.extend(data.iter().take(room));
        self.update_interrupt();
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(u8::MAX);
        if let [value] = data {
            *value = self.read_register(offset);
            self.update_interrupt();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let &[value] = data {
            self.write_register(offset, value);
            // Sending is instant: the transmitter was busy, then is not.
            if offset == DATA {
                self.state.raised &= self.pending() == IIR_DATA;
            }
            self.update_interrupt();
        }
    }
}

/// An event descriptor only refuses when its counter is full: then it is
/// signalled already.
fn signal(event: &EventFd) {
    let _ = event.write(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Bench {
        port: Serial,
        interrupt: EventFd,
        host_event: EventFd,
    }

    fn bench() -> Bench {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (interrupt, host_event) = (event(), event());
        let port = Serial::new(
            SerialState::default(),
            interrupt.try_clone().unwrap(),
            host_event.try_clone().unwrap(),
        );
        Bench {
            port,
            interrupt,
            host_event,
        }
    }

    impl Bench {
        fn read(&mut self, offset: u64) -> u8 {
            let mut data = [0];
            self.port.read(offset, &mut data);
            data[0]
        }
        fn write(&mut self, offset: u64, value: u8) {
            self.port.write(offset, &[value]);
        }
        fn interrupts(&self) -> u64 {
            self.interrupt.read().unwrap_or(0)
        }
        fn attentions(&self) -> u64 {
            self.host_event.read().unwrap_or(0)
        }
        fn enable(&mut self, interrupts: Ier) {
            self.write(IER, interrupts.bits());
        }
    }

    #[test]
    fn output_is_kept_in_order_and_announced_once() {
        let mut bench = bench();
        for &byte in b"hello" {
            bench.write(DATA, byte);
        }
        assert_eq!(bench.attentions(), 1);
        assert_eq!(bench.port.output(), b"hello");
        bench.port.output_done(2);
        assert_eq!(bench.port.output(), b"llo");
        bench.port.output_done(100);
        assert_eq!(bench.port.output(), b"");
        assert_eq!(bench.interrupts(), 0);
    }

    #[test]
    fn a_full_transmitter_says_so_and_interrupts_when_it_drains() {
        let mut bench = bench();
        bench.enable(Ier::THRE);
        // As Linux does: it looks, then fills the FIFO. Nothing is lost.
        let mut sent = 0;
        while bench.read(LSR) & Lsr::THR_EMPTY.bits() != 0 {
            for _ in 0..TRANSMIT_FIFO {
                bench.write(DATA, b'x');
                sent += 1;
            }
        }
        assert_eq!(bench.port.state.output.len(), sent);
        for _ in sent..=OUTPUT_MAX {
            bench.write(DATA, b'y'); // the last is lost
        }
        assert_eq!(bench.port.state.output.len(), OUTPUT_MAX);
        bench.interrupts();
        bench.port.output_done(TRANSMIT_FIFO);
        assert_eq!(bench.interrupts(), 1);
        assert_eq!(bench.read(IIR_FCR), IIR_THRE);
        assert_eq!(bench.read(IIR_FCR), IIR_NONE);
    }

    #[test]
    fn enabling_the_transmitter_s_interrupt_raises_it_and_so_does_each_byte() {
        let mut bench = bench();
        bench.enable(Ier::THRE);
        assert_eq!(bench.interrupts(), 1);
        bench.write(DATA, b'a');
        assert_eq!(bench.interrupts(), 1);
        assert_eq!(bench.read(IIR_FCR), IIR_THRE);
        assert_eq!(bench.interrupts(), 0);
        bench.enable(Ier::empty());
        bench.write(DATA, b'a');
        assert_eq!(bench.interrupts(), 0);
    }

    #[test]
    fn input_interrupts_is_read_in_order_and_bounded() {
        let mut bench = bench();
        bench.port.input(b"nobody listens");
        bench.enable(Ier::all());
        assert_eq!((bench.port.input_room(), bench.attentions()), (0, 0));
        bench.enable(Ier::DATA);
        bench.interrupts();
        assert_eq!(bench.attentions(), 1);
        bench.port.input(b"ab");
        assert_eq!(bench.interrupts(), 1);
        assert_eq!(bench.read(IIR_FCR), IIR_DATA);
        assert_eq!(bench.read(LSR) & Lsr::DATA.bits(), Lsr::DATA.bits());
        assert_eq!((bench.read(DATA), bench.read(DATA)), (b'a', b'b'));
        assert_eq!(bench.read(IIR_FCR), IIR_NONE);
        assert_eq!(bench.read(DATA), 0);
        bench.port.input(&[b'z'; 1000]);
        assert_eq!(bench.port.input_room(), 0);
        assert_eq!(bench.attentions(), 0);
        bench.read(DATA);
        assert_eq!(bench.attentions(), 1);
        bench.port.input(b"z");
        bench.write(IIR_FCR, Fcr::CLEAR_INPUT.bits() | Fcr::ENABLE.bits());
        assert_eq!(bench.attentions(), 1);
        assert_eq!(bench.read(IIR_FCR), IIR_NONE | IIR_FIFO_ENABLED);
    }

    #[test]
    fn loopback_answers_as_linux_probes_it() {
        let mut bench = bench();
        let probe = Mcr::LOOP | Mcr::OUT2 | Mcr::RTS;
        bench.write(MCR, probe.bits());
        assert_eq!(bench.read(MSR), (Msr::DCD | Msr::CTS).bits());
        bench.write(DATA, b'l');
        assert_eq!(bench.port.output(), b"");
        assert_eq!(bench.read(DATA), b'l');
        bench.write(LCR, LCR_DIVISOR_LATCH);
        bench.write(DATA, 1);
        bench.write(IER, 2);
        assert_eq!((bench.read(DATA), bench.read(IER)), (1, 2));
        bench.write(LCR, LCR_DEFAULT);
        bench.write(SCR, 0x5a);
        assert_eq!((bench.read(IER), bench.read(SCR)), (0, 0x5a));
    }

    proptest! {
        #[test]
        fn no_sequence_of_accesses_panics_or_grows(
            accesses in prop::collection::vec((0u64..9, any::<bool>(), 0usize..9, any::<u8>()), 0..200)
        ) {
            let mut bench = bench();
            for (offset, write, len, value) in accesses {
                let mut data = vec![value; len];
                if write {
                    bench.port.write(offset, &data);
                } else {
                    bench.port.read(offset, &mut data);
                }
                bench.port.input(&data);
                prop_assert!(bench.port.state.input.len() <= INPUT_MAX);
                prop_assert!(bench.port.state.output.len() <= OUTPUT_MAX);
            }
            let saved = bench.port.save();
            let text = serde_json::to_string(&saved).unwrap();
            prop_assert_eq!(serde_json::from_str::<SerialState>(&text).unwrap(), saved);
        }
    }
}
