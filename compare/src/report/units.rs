//! Numbers and foreign words, as people read them.

use unicode_width::UnicodeWidthChar;

/// One unit for times that stand below each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Its name.
    pub unit: &'static str,
    ns: f64,
    decimals: usize,
}

impl Scale {
    /// What shows the least of them with two digits at least.
    pub fn of(times: impl IntoIterator<Item = u64>) -> Scale {
        let least = times.into_iter().filter(|&it| it > 0).min().unwrap_or(0);
        let (unit, ns, decimals) = match least {
            0..1_000 => ("µs", 1e3, 2),
            1_000..100_000 => ("µs", 1e3, 1),
            100_000..10_000_000 => ("ms", 1e6, 2),
            10_000_000..1_000_000_000 => ("ms", 1e6, 1),
            _ => ("s", 1e9, 2),
        };
        Scale { unit, ns, decimals }
    }

    /// A time in it, without its name.
    pub fn number(&self, ns: f64) -> String {
        format!("{:.*}", self.decimals, ns / self.ns)
    }

    /// A time in it.
    pub fn text(&self, ns: f64) -> String {
        format!("{} {}", self.number(ns), self.unit)
    }
}

/// A time by itself, with three digits that count.
pub fn duration(ns: f64) -> String {
    let (value, unit) = match ns {
        ..1e3 => (ns, "ns"),
        1e3..1e6 => (ns / 1e3, "µs"),
        1e6..1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    format!("{} {unit}", digits(value))
}

/// A number with three digits that count.
pub fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        100.0.. => 0,
        10.0..100.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

/// KiB as MiB, without the unit.
pub fn mib(kib: f64) -> String {
    format!("{:.1}", kib / 1024.0)
}

/// A ratio: how many times.
pub fn times(ratio: f64) -> String {
    match ratio {
        100.0.. => format!("{ratio:.0}×"),
        _ => format!("{ratio:.1}×"),
    }
}

/// What foreign words look like, whatever they hold: one line, and no command to a terminal.
pub fn printable(text: &str) -> String {
    // Zero-width and direction characters could make a name look like another one.
    let hidden = |it: char| {
        let spaces = matches!(it, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}');
        let joins = matches!(it, '\u{2060}'..='\u{2069}' | '\u{feff}');
        it.is_control() || spaces || joins
    };
    text.chars()
        .map(|it| if hidden(it) { '\u{fffd}' } else { it })
        .collect()
}

/// Words as a shell takes them.
pub fn shell(words: &[String]) -> String {
    let plain = |it: char| it.is_ascii_alphanumeric() || "-_./:=,+@%{}".contains(it);
    let word = |word: &String| match word.chars().all(plain) && !word.is_empty() {
        true => word.clone(),
        false => format!("'{}'", printable(word).replace('\'', r"'\''")),
    };
    words.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// The columns that a text takes on a terminal.
pub fn columns(text: &str) -> usize {
    // Letter by letter: terminals join them as they please.
    text.chars().filter_map(UnicodeWidthChar::width).sum()
}

/// Not longer than `width` columns.
pub fn shorten(text: &str, width: usize) -> String {
    if columns(text) <= width {
        return text.to_owned();
    }
    let mut short = String::new();
    let mut left = width.saturating_sub(1);
    for it in text.chars() {
        match left.checked_sub(it.width().unwrap_or(0)) {
            Some(rest) => left = rest,
            None => break,
        }
        short.push(it);
    }
    short.push('…');
    short
}

/// Lines of at most `width` columns, as far as there are spaces; longer words are divided.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_whitespace() {
        let wide = columns(word);
        if used > 0 && used + 1 + wide <= width {
            if let Some(line) = lines.last_mut() {
                line.push(' ');
                line.push_str(word);
            }
            used += 1 + wide;
            continue;
        }
        if used > 0 {
            lines.push(String::new());
            used = 0;
        }
        for it in word.chars() {
            let wide = it.width().unwrap_or(0);
            if used > 0 && used + wide > width {
                lines.push(String::new());
                used = 0;
            }
            if let Some(line) = lines.last_mut() {
                line.push(it);
            }
            used += wide;
        }
    }
    lines
}

/// A few names in a sentence: "a, b and c".
pub fn list(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_serves_all_times_of_a_column() {
        let scale = Scale::of([620_000, 61_234_567]);
        assert_eq!(scale.text(620_000.0), "0.62 ms");
        assert_eq!(scale.number(61_234_567.0), "61.23");
        assert_eq!(Scale::of([38_200_000]).text(38_249_000.0), "38.2 ms");
        assert_eq!(Scale::of([2_500_000_000]).text(2.5e9), "2.50 s");
        assert_eq!(Scale::of([]).text(0.0), "0.00 µs");
    }

    #[test]
    fn times_by_themselves_have_three_digits() {
        let all = [312.0, 1_500.0, 61_234_567.0, 612_345_678.0, 2.5e9].map(duration);
        assert_eq!(all, ["312 ns", "1.50 µs", "61.2 ms", "612 ms", "2.50 s"]);
    }

    #[test]
    fn foreign_words_command_nothing() {
        assert_eq!(
            printable("a\x1b[2Jb\nc\u{202e}d"),
            "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d"
        );
        let words = ["runc", "run", "it's", "", "a;b"].map(str::to_owned);
        assert_eq!(shell(&words), r"runc run 'it'\''s' '' 'a;b'");
    }

    #[test]
    fn lines_are_as_wide_as_they_may_be() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("extraordinary", 5), ["extra", "ordin", "ary"]);
        assert_eq!(wrap("a 名前名前", 4), ["a", "名前", "名前"]);
        assert_eq!(shorten("名前名前", 5), "名前…");
        assert_eq!(shorten("crun", 4), "crun");
    }
}
