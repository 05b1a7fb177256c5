//! The watchdog action table (Microsoft's "Hardware Watchdog Timers Design
//! Specification"): what to read and write at which port to drive a watchdog.

use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;

use crate::acpi_table::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, SDT_HEADER_LEN, bytes_of};
use crate::layout::{WATCHDOG_CONTROL, WATCHDOG_COUNT, WATCHDOG_FEED, WATCHDOG_RUN};

const REVISION: u8 = 1;
/// The watchdog's header, behind that of all tables.
const HEADER_LEN: u32 = 32;
/// Segment, bus, device and function of one that is not on PCI.
const NO_PCI: u8 = 0xff;
/// The unit of counts.
const PERIOD_MS: u32 = 1000;
const COUNT_MIN: u32 = 1;
const COUNT_MAX: u32 = 0xffff;
/// How many entries the table has.
const ENTRIES: u32 = 8;
const ENABLED: u8 = 1;

#[derive(Clone, Copy)]
#[repr(u8)]
enum Action {
    Feed = 0x01,
    QueryCurrentCountdown = 0x04,
    QueryCountdown = 0x05,
    SetCountdown = 0x06,
    QueryRunning = 0x08,
    SetRunning = 0x09,
    QueryStopped = 0x0a,
    SetStopped = 0x0b,
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Instruction {
    ReadValue = 0,
    ReadCountdown = 1,
    WriteValue = 2,
    WriteCountdown = 3,
}

#[derive(Clone, Copy)]
enum Register {
    Byte(u16),
    Word(u16),
}

pub(crate) fn wdat() -> Vec<u8> {
    use Action::*;
    use Instruction::*;
    let control = Register::Byte(WATCHDOG_CONTROL);
    let count = Register::Word(WATCHDOG_COUNT);
    let (run, stop) = (u32::from(WATCHDOG_RUN), 0);
    let entries: [_; ENTRIES as usize] = [
        (Feed, WriteValue, Register::Byte(WATCHDOG_FEED), 1),
        // Linux asks the second of these for the time that is left.
        (QueryCurrentCountdown, ReadCountdown, count, 0),
        (QueryCountdown, ReadCountdown, count, 0),
        (SetCountdown, WriteCountdown, count, 0),
        (QueryRunning, ReadValue, control, run),
        (SetRunning, WriteValue, control, run),
        (QueryStopped, ReadValue, control, stop),
        (SetStopped, WriteValue, control, stop),
    ];
    let mut table = Sdt::new(
        *b"WDAT",
        SDT_HEADER_LEN,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append(HEADER_LEN);
    table.append(u16::from(NO_PCI));
    table.append([NO_PCI; 3]);
    table.append([0u8; 3]);
    table.append(PERIOD_MS);
    table.append(COUNT_MAX);
    table.append(COUNT_MIN);
    table.append([ENABLED, 0, 0, 0]);
    table.append(ENTRIES);
    for (action, instruction, register, value) in entries {
        table.append([action as u8, instruction as u8, 0, 0]);
        let (mask, gas) = match register {
            Register::Byte(port) => (u32::from(u8::MAX), gas(port, 8, AccessSize::ByteAccess)),
            Register::Word(port) => (u32::from(u16::MAX), gas(port, 16, AccessSize::WordAccess)),
        };
        table.append_slice(&bytes_of(&gas));
        table.append(value);
        table.append(mask);
    }
    table.as_slice().to_vec()
}

fn gas(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_as_linux_wants_it() {
        let table = wdat();
        assert_eq!(table.len(), 36 + 32 + 8 * 24);
        let header = &table[36..68];
        assert_eq!(header[..4], 32u32.to_le_bytes());
        assert_eq!(header[4..9], [0xff, 0, 0xff, 0xff, 0xff]);
        assert_eq!(header[12..16], 1000u32.to_le_bytes());
        assert_eq!((header[24], header[28]), (1, 8));
        // Set the countdown: write it, to a 16-bit port.
        let entry = &table[68 + 3 * 24..68 + 4 * 24];
        assert_eq!(entry[..8], [6, 3, 0, 0, 1, 16, 0, 2]);
        assert_eq!(entry[8..16], u64::from(WATCHDOG_COUNT).to_le_bytes());
        assert_eq!(entry[20..24], 0xffffu32.to_le_bytes());
    }
}
