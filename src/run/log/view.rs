//! What of a log is shown, and how: its last lines, and when each line began.

use std::collections::VecDeque;

use mayfly_text::date::date;

use super::piece::Piece;

/// The last lines of a log.
pub struct Tail {
    max: usize,
    /// A line each; of the last one of a stream, what there is of it.
    lines: VecDeque<Piece>,
    /// How many lines came before them.
    dropped: usize,
    /// The numbers of lines without an end, of each stream.
    open: [Option<usize>; 2],
}

impl Tail {
    /// A tail of at most `max` lines.
    pub fn new(max: usize) -> Self {
        Tail {
            max,
            lines: VecDeque::new(),
            dropped: 0,
            open: [None; 2],
        }
    }

    /// Adds what comes next.
    pub fn push(&mut self, piece: Piece) {
        let [out, err] = &mut self.open;
        let open = if piece.stream == 2 { err } else { out };
        for part in piece.data.split_inclusive(|&byte| byte == b'\n') {
            let begun = open.and_then(|number| number.checked_sub(self.dropped));
            match begun.and_then(|index| self.lines.get_mut(index)) {
                Some(line) => line.data.extend_from_slice(part),
                None => {
                    *open = Some(self.dropped + self.lines.len());
                    self.lines.push_back(Piece {
                        data: part.to_vec(),
                        ..piece
                    });
                }
            }
            if part.ends_with(b"\n") {
                *open = None;
            }
            if self.lines.len() > self.max {
                self.lines.pop_front();
                self.dropped += 1;
            }
        }
    }

    /// What there is.
    pub fn into_lines(self) -> impl Iterator<Item = Piece> {
        self.lines.into_iter()
    }
}

/// Puts before each line when it began.
#[derive(Default)]
pub struct Stamps {
    /// In the middle of a line, of each stream.
    inside: [bool; 2],
}

impl Stamps {
    /// A piece with its times.
    pub fn put(&mut self, piece: &Piece) -> Vec<u8> {
        let [out, err] = &mut self.inside;
        let inside = if piece.stream == 2 { err } else { out };
        let mut text = Vec::with_capacity(piece.data.len());
        for part in piece.data.split_inclusive(|&byte| byte == b'\n') {
            if !*inside {
                text.extend_from_slice(date(piece.time_ms).as_bytes());
                text.push(b' ');
            }
            text.extend_from_slice(part);
            *inside = !part.ends_with(b"\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(stream: u8, data: &str) -> Piece {
        Piece {
            stream,
            time_ms: 1000,
            data: data.into(),
        }
    }

    #[test]
    fn the_last_lines_are_whole() {
        let tail = |max| {
            let mut tail = Tail::new(max);
            for (stream, data) in [(1, "a\nb"), (2, "x\ny"), (1, "c\nd\n"), (2, "z")] {
                tail.push(piece(stream, data));
            }
            let lines = tail.into_lines();
            let lines = lines.map(|it| (it.stream, String::from_utf8(it.data).unwrap()));
            lines.collect::<Vec<_>>()
        };
        let all = [(1, "a\n"), (1, "bc\n"), (2, "x\n"), (2, "yz"), (1, "d\n")];
        let all = all.map(|(stream, data)| (stream, data.to_owned()));
        for max in 3..7 {
            assert_eq!(tail(max), all[5_usize.saturating_sub(max)..], "{max}");
        }
        assert_eq!(tail(0), []);
    }

    #[test]
    fn lines_have_the_times_of_their_beginnings() {
        let mut stamps = Stamps::default();
        let mut put = |stream, data| String::from_utf8(stamps.put(&piece(stream, data))).unwrap();
        let time = "1970-01-01T00:00:01.000Z";
        assert_eq!(put(1, "a\nb"), format!("{time} a\n{time} b"));
        assert_eq!(put(2, "x"), format!("{time} x"));
        assert_eq!(put(1, "c\n\n"), format!("c\n{time} \n"));
    }
}
