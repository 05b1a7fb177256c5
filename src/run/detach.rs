//! The keys with which a user leaves a command that goes on.

/// Where the user says nothing: as in Docker.
pub const DEFAULT: &str = "ctrl-p,ctrl-q";

/// A sequence of keys, and how much of it was typed last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetachKeys {
    keys: Vec<u8>,
    typed: usize,
}

impl DetachKeys {
    /// Reads keys with commas between them: a character, or `ctrl-` and one. None are
    /// nothing to leave with.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        if text.is_empty() {
            return Ok(None);
        }
        let keys = text.split(',').map(|key| {
            let key = match key.strip_prefix("ctrl-") {
                Some(key) => match key.as_bytes() {
                    &[
                        key
                        @ (b'a'..=b'z' | b'A'..=b'Z' | b'@' | b'[' | b'\\' | b']' | b'^' | b'_'),
                    ] => Some(key & 0x1f),
                    _ => None,
                },
                None => match key.as_bytes() {
                    &[key] => Some(key),
                    _ => None,
                },
            };
            key.ok_or_else(|| {
                format!(
                    "--detach-keys {text}: write keys such as a or ctrl-a, with commas between them"
                )
            })
        });
        let keys = keys.collect::<Result<_, _>>()?;
        Ok(Some(DetachKeys { keys, typed: 0 }))
    }

    /// Adds to `passed` what is the command's; true if the keys were typed: what
    /// comes behind them is nobody's.
    pub fn filter(&mut self, typed: &[u8], passed: &mut Vec<u8>) -> bool {
        for &byte in typed {
            if self.keys.get(self.typed) != Some(&byte) {
                // It was not meant.
                passed.extend(self.keys.iter().take(self.typed));
                self.typed = 0;
            }
            match self.keys.get(self.typed) {
                Some(&key) if key == byte => self.typed += 1,
                _ => passed.push(byte),
            }
            if self.typed == self.keys.len() {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_docker_s_names() {
        let keys = |text: &str| DetachKeys::parse(text).unwrap().unwrap().keys;
        assert_eq!(keys(DEFAULT), [16, 17]);
        assert_eq!(keys("ctrl-@,a,ctrl-["), [0, b'a', 27]);
        assert_eq!(DetachKeys::parse("").unwrap(), None);
        for text in ["ctrl-", "ctrl-1", "ab", "a,,b", "ctrl-pq", "é"] {
            assert!(DetachKeys::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn keys_are_found_even_when_they_come_apart() {
        let mut keys = DetachKeys::parse("ctrl-p,ctrl-q").unwrap().unwrap();
        let mut passed = Vec::new();
        let mut typed = |text: &[u8]| {
            let found = keys.filter(text, &mut passed);
            (std::mem::take(&mut passed), found)
        };
        assert_eq!(typed(b"a\x11b"), (b"a\x11b".to_vec(), false));
        assert_eq!(typed(b"a\x10"), (b"a".to_vec(), false));
        // The command gets it when another key follows.
        assert_eq!(typed(b"b"), (b"\x10b".to_vec(), false));
        assert_eq!(typed(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(typed(b"\x11rest"), (Vec::new(), true));
    }
}
