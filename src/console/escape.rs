//! The keys that the monitor takes for itself: Ctrl-A and a letter.

const CTRL_A: u8 = 0x01;

/// What a terminal's input asks the monitor for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Show the keys.
    Help,
    /// End the VM.
    Quit,
}

/// What [`Request::Help`] shows.
pub const HELP: &str =
    "\r\nCtrl-A h  this help\r\nCtrl-A x  end the VM at once\r\nCtrl-A Ctrl-A  send Ctrl-A\r\n";

/// Remembers whether the last key was Ctrl-A.
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Keeps in `input` what is the guest's, and returns the last request.
    pub fn filter(&mut self, input: &mut Vec<u8>) -> Option<Request> {
        let mut request = None;
        input.retain(|&byte| {
            if !std::mem::take(&mut self.pending) {
                self.pending = byte == CTRL_A;
                return byte != CTRL_A;
            }
            match byte {
                b'x' | b'X' => request = Some(Request::Quit),
                b'h' | b'H' | b'?' if request.is_none() => request = Some(Request::Help),
                _ => {}
            }
            byte == CTRL_A
        });
        request
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_taken_even_when_they_come_apart() {
        let mut escape = Escape::default();
        let mut filter = |input: &[u8]| {
            let mut input = input.to_vec();
            let request = escape.filter(&mut input);
            (input, request)
        };
        assert_eq!(filter(b"a\x01\x01b"), (b"a\x01b".to_vec(), None));
        assert_eq!(filter(b"a\x01"), (b"a".to_vec(), None));
        assert_eq!(filter(b"hi"), (b"i".to_vec(), Some(Request::Help)));
        assert_eq!(filter(b"\x01q\x01x"), (b"".to_vec(), Some(Request::Quit)));
        assert_eq!(filter(b"x"), (b"x".to_vec(), None));
    }
}
