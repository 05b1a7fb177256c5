//! The last of what the guest printed, for those who did not see it.

use std::collections::VecDeque;

/// How much is kept …
const KEPT_MAX: usize = 8 << 10;
/// … and how much of it is shown: a panic's text, with its trace, is this long.
const LINES_MAX: usize = 50;
const LINE_MAX: usize = 200;

/// The last bytes of a console.
#[derive(Default)]
pub struct Tail(VecDeque<u8>);

impl Tail {
    /// Keeps output, and forgets older one.
    pub fn push(&mut self, output: &[u8]) {
        let output = &output[output.len().saturating_sub(KEPT_MAX)..];
        let excess = (self.0.len() + output.len()).saturating_sub(KEPT_MAX);
        self.0.drain(..excess);
        self.0.extend(output);
    }

    /// The last lines, fit for a terminal: what is not ASCII, and what commands
    /// terminals, is left out.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        for line in bytes.split(|&byte| byte == b'\n').rev() {
            let line = visible(line);
            if !line.is_empty() {
                lines.push(line);
            }
            if lines.len() == LINES_MAX {
                break;
            }
        }
        lines.reverse();
        lines
    }
}

fn visible(line: &[u8]) -> String {
    const ESCAPE: u8 = 0x1b;
    let mut text = String::new();
    let mut bytes = line.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            // A control sequence (ECMA-48, 5.4): `ESC [` to its final byte.
            ESCAPE if bytes.next_if_eq(&b'[').is_some() => {
                while bytes.next_if(|byte| matches!(byte, 0x20..=0x3f)).is_some() {}
                bytes.next_if(|byte| matches!(byte, 0x40..=0x7e));
            }
            b'\t' => text.push(' '),
            b' '..=b'~' if text.len() < LINE_MAX => text.push(byte.into()),
            _ => {}
        }
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(output: &[u8]) -> Vec<String> {
        let mut tail = Tail::default();
        tail.push(output);
        tail.lines()
    }

    #[test]
    fn is_clean_and_bounded() {
        assert_eq!(lines(b""), [""; 0]);
        assert_eq!(
            lines(b"\x1b[1;31mred\x1b[0m\tand \x07\x9b\xe2\x80\xae more \r\n\r\n\x1b[2J\nlast"),
            ["red and  more", "last"]
        );
        assert_eq!(lines(b"\x1b]0;title\x07\x1b["), ["]0;title"]);
        let many: Vec<u8> = (0..1000)
            .flat_map(|i| format!("{i}\n").into_bytes())
            .collect();
        let last = lines(&many);
        assert_eq!(
            (last.len(), last[0].as_str(), last[49].as_str()),
            (50, "950", "999")
        );
        assert_eq!(lines(&[b'x'; 100_000]), ["x".repeat(LINE_MAX)]);
        assert_eq!(lines(&[b'\t'; 100_000]), [""; 0]);
    }

    #[test]
    fn older_output_is_forgotten() {
        let mut tail = Tail::default();
        for _ in 0..100 {
            tail.push(&[b'a'; 1000]);
            assert!(tail.0.len() <= KEPT_MAX);
        }
        tail.push(b"\nb");
        assert_eq!(tail.0.len(), KEPT_MAX);
        assert_eq!(tail.lines()[1], "b");
    }
}
