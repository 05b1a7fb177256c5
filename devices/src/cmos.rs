//! A CMOS clock (Motorola MC146818) that tells the host's time in UTC.
//!
//! Without one, Linux' driver waits for seconds for an update to end.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;

const INDEX: u64 = 0;
const DATA: u64 = 1;
/// The top bit of the index masks NMIs.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
/// The century, by the custom that FADT's `century` names.
const CENTURY: u8 = 0x32;

/// 32,768 Hz time base, 1,024 Hz rate; never an update in progress.
const STATUS_A_VALUE: u8 = 0x26;
/// 24 hours, BCD.
const STATUS_B_VALUE: u8 = 0x02;
/// The battery is good.
const STATUS_D_VALUE: u8 = 0x80;

const DAY_SECONDS: u64 = 86_400;

/// What the guest can see of the clock, apart from the time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    index: u8,
}

/// The device.
#[derive(Default)]
pub struct Cmos {
    state: CmosState,
}

impl Cmos {
    /// A clock in a saved state.
    pub fn new(state: CmosState) -> Self {
        Cmos { state }
    }

    /// Its state.
    pub fn save(&self) -> CmosState {
        self.state.clone()
    }
}

impl BusDevice for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (DATA, [value]) = (offset, data) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            *value = register(self.state.index, now.map_or(0, |time| time.as_secs()));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // The time is the host's: what the guest sets is not kept.
        if let (INDEX, &[value]) = (offset, data) {
            self.state.index = value & INDEX_MASK;
        }
    }
}

/// A register's value at a time in seconds since 1970.
fn register(index: u8, now: u64) -> u8 {
    let (year, month, day) = date(now / DAY_SECONDS);
    let bcd = |value: u64| {
        let [byte, ..] = ((value / 10 % 10) << 4 | value % 10).to_le_bytes();
        byte
    };
    match index {
        SECONDS => bcd(now % 60),
        MINUTES => bcd(now / 60 % 60),
        HOURS => bcd(now / 3600 % 24),
        // 1 is Sunday; 1970 began on a Thursday.
        WEEKDAY => bcd((now / DAY_SECONDS + 4) % 7 + 1),
        DAY => bcd(day),
        MONTH => bcd(month),
        YEAR => bcd(year % 100),
        CENTURY => bcd(year / 100),
        STATUS_A => STATUS_A_VALUE,
        STATUS_B => STATUS_B_VALUE,
        STATUS_D => STATUS_D_VALUE,
        _ => 0,
    }
}

/// Year, month and day (from 1) of a day since 1970, in the Gregorian
/// calendar. Years start in March here, so that leap days end them.
fn date(days: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097; // days in 400 years
    const MARCH_1_OF_YEAR_0: u64 = 719_468; // days before 1970
    let days = days + MARCH_1_OF_YEAR_0;
    let (era, day) = (days / ERA, days % ERA);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // from March
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_the_calendar_s() {
        for (seconds, expected) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (951_868_800, (2000, 3, 1)),
            (1_735_689_599, (2024, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
        ] {
            assert_eq!(date(seconds / DAY_SECONDS), expected);
        }
    }

    #[test]
    fn time_is_bcd_in_24_hours() {
        let now = 1_764_025_199; // 2025-11-24 22:59:59, a Monday
        let time = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS]
            .map(|index| register(index, now));
        assert_eq!(time, [0x20, 0x25, 0x11, 0x24, 0x02, 0x22, 0x59, 0x59]);
        assert_eq!(register(STATUS_D, now), 0x80);
    }

    #[test]
    fn the_index_selects_and_odd_accesses_are_harmless() {
        let mut clock = Cmos::default();
        let read = |clock: &mut Cmos, offset, len| {
            let mut data = vec![0; len];
            clock.read(offset, &mut data);
            data
        };
        clock.write(INDEX, &[0x80 | STATUS_D]);
        assert_eq!(read(&mut clock, DATA, 1), [STATUS_D_VALUE]);
        clock.write(DATA, &[1]);
        clock.write(INDEX, &[0, 0]);
        assert_eq!(read(&mut clock, DATA, 1), [STATUS_D_VALUE]);
        assert_eq!(read(&mut clock, INDEX, 1), [0xff]);
        assert_eq!(read(&mut clock, INDEX, 2), [0xff, 0xff]);
        let copy = Cmos::new(clock.save());
        assert_eq!(copy.save(), clock.save());
    }
}
