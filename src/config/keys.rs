//! Values of the form `key=value,flag,…`, as flags have them, or as tables of TOML.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// What is made of an option's keys.
pub trait FromKeys: Sized {
    /// How the value of its flag is written, for messages.
    const SYNTAX: &'static str;
    /// The key in a table of what stands alone in its flag: `size` in
    /// `memory = { size = "2G" }`.
    const WORD: Option<&'static str> = None;

    /// Takes the keys that it knows, and refuses others.
    fn from_keys(keys: Keys) -> Result<Self, String>;

    /// Reads the value of its flag.
    fn from_text(text: &OsStr) -> Result<Self, String> {
        Self::from_keys(Keys::parse_bytes(text.as_bytes(), Self::SYNTAX))
    }
}

/// The value of a key in a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// The key alone, or its absence.
    Flag(bool),
    /// A number.
    Number(i64),
    /// A text.
    Text(String),
    /// The key several times.
    List(Vec<String>),
}

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

    /// The keys of a table, where the value of one stands alone in a flag.
    pub fn of_table(table: &[(String, Value)], word: Option<&str>, syntax: &'static str) -> Self {
        let mut entries = Vec::new();
        for (key, value) in table {
            let mut add = |text: &str| entries.push((key.clone(), Some(text.as_bytes().to_vec())));
            match value {
                Value::Text(text) if Some(key.as_str()) == word => {
                    entries.insert(0, (text.clone(), None))
                }
                Value::Text(text) => add(text),
                Value::Number(number) if Some(key.as_str()) == word => {
                    entries.insert(0, (number.to_string(), None));
                }
                Value::Number(number) => add(&number.to_string()),
                Value::List(list) => list.iter().for_each(|text| add(text)),
                Value::Flag(true) => entries.push((key.clone(), None)),
                Value::Flag(false) => {}
            }
        }
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

    /// Takes `key=value` where the value is a path, which must be there.
    pub fn required_path(&mut self, key: &str) -> Result<PathBuf, String> {
        self.path(key)?
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
