//! Values of the form `key=value,flag,…`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The keys of an option's value, taken out one by one; what is left at the
/// end is not understood.
pub struct Keys {
    entries: Vec<(String, Option<Vec<u8>>)>,
    syntax: &'static str,
}

impl Keys {
    /// Splits the value; a comma in it is written twice. `syntax` is what
    /// messages recommend.
    pub fn parse(text: &str, syntax: &'static str) -> Self {
        Keys::parse_bytes(text.as_bytes(), syntax)
    }

    /// The same where a path in it may be of any bytes.
    pub fn parse_bytes(text: &[u8], syntax: &'static str) -> Self {
        let mut parts = vec![Vec::new()];
        let mut bytes = text.iter().copied().peekable();
        while let Some(byte) = bytes.next() {
            match parts.last_mut() {
                Some(last) if byte != b',' => last.push(byte),
                Some(last) if bytes.next_if_eq(&b',').is_some() => last.push(b','),
                _ => parts.push(Vec::new()),
            }
        }
        let key = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let entries = parts
            .into_iter()
            .map(|part| match part.iter().position(|&byte| byte == b'=') {
                Some(at) => (key(&part[..at]), Some(part[at + 1..].to_vec())),
                None => (key(&part), None),
            })
            .collect();
        Keys { entries, syntax }
    }

    /// Takes `key=value`. An empty value is none.
    pub fn value(&mut self, key: &str) -> Result<Option<String>, String> {
        let value = self.bytes(key)?.map(|value| text(key, value));
        value.transpose()
    }

    /// Takes `key=value` where the value is a path, which may be of any bytes.
    pub fn path(&mut self, key: &str) -> Result<Option<PathBuf>, String> {
        let value = self.bytes(key)?;
        Ok(value.map(|value| OsString::from_vec(value).into()))
    }

    fn bytes(&mut self, key: &str) -> Result<Option<Vec<u8>>, String> {
        match self.take(key)? {
            Some(Some(value)) if !value.is_empty() => Ok(Some(value)),
            Some(_) => Err(format!("{key} has no value; write {}", self.syntax)),
            None => Ok(None),
        }
    }

    /// Takes each `key=value`, of which there may be several.
    pub fn values(&mut self, key: &str) -> Result<Vec<String>, String> {
        let (own, others) = std::mem::take(&mut self.entries)
            .into_iter()
            .partition(|(name, _)| name == key);
        self.entries = others;
        let own: Vec<(String, Option<Vec<u8>>)> = own;
        own.into_iter()
            .map(|(_, value)| match value {
                Some(value) if !value.is_empty() => text(key, value),
                _ => Err(format!("{key} has no value; write {}", self.syntax)),
            })
            .collect()
    }

    /// Takes `key=value`, which must be there.
    pub fn required(&mut self, key: &str) -> Result<String, String> {
        self.value(key)?
            .ok_or_else(|| format!("has no {key}=; write {}", self.syntax))
    }

    /// Takes `key` alone.
    pub fn flag(&mut self, key: &str) -> Result<bool, String> {
        match self.take(key)? {
            Some(None) => Ok(true),
            Some(Some(_)) => Err(format!("{key} takes no value; write {}", self.syntax)),
            None => Ok(false),
        }
    }

    /// Takes the first word, which stands without a `=`.
    pub fn word(&mut self) -> Option<String> {
        match self.entries.first() {
            Some((_, None)) => Some(self.entries.remove(0).0),
            _ => None,
        }
    }

    /// Refuses what was not taken.
    pub fn finish(self) -> Result<(), String> {
        match self.entries.first() {
            None => Ok(()),
            Some((key, _)) => Err(format!(
                "{key:?} is not understood; write {} (a comma in a name twice)",
                self.syntax
            )),
        }
    }

    fn take(&mut self, key: &str) -> Result<Option<Option<Vec<u8>>>, String> {
        let mut found = None;
        while let Some(at) = self.entries.iter().position(|(name, _)| name == key) {
            if found.replace(self.entries.remove(at).1).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        Ok(found)
    }
}

fn text(key: &str, value: Vec<u8>) -> Result<String, String> {
    String::from_utf8(value).map_err(|_| format!("{key}= is not UTF-8"))
}

/// Writes a value as [`Keys::parse`] reads it.
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}
