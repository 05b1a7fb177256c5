//! Times as text.

/// A time as RFC 3339 has it, in UTC: milliseconds since 1970.
pub fn date(time_ms: u64) -> String {
    let (seconds, ms) = (time_ms / 1000, time_ms % 1000);
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    // The calendar is the same every 400 years.
    const PERIOD: u64 = 146_097;
    let mut year = 1970 + 400 * (days / PERIOD);
    days %= PERIOD;
    let every = |year: u64, count| year.is_multiple_of(count);
    let leap = |year| every(year, 4) && (!every(year, 100) || every(year, 400));
    let len = |year| 365 + u64::from(leap(year));
    while days >= len(year) {
        days -= len(year);
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for len in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < len {
            break;
        }
        days -= len;
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let day = days + 1;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_days_of_the_calendar() {
        for (time_ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (1_798_761_599_000, "2026-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(date(time_ms), text);
        }
        // A log or a record may say anything.
        date(u64::MAX);
    }
}
