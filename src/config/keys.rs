//! Values of the form `key=value,flag,…`.

/// The keys of an option's value, taken out one by one; what is left at the
/// end is not understood.
pub struct Keys {
    entries: Vec<(String, Option<String>)>,
    syntax: &'static str,
}

impl Keys {
    /// Splits the value; a comma in it is written twice. `syntax` is what
    /// messages recommend.
    pub fn parse(text: &str, syntax: &'static str) -> Self {
        let mut parts = vec![String::new()];
        let mut characters = text.chars().peekable();
        while let Some(character) = characters.next() {
            let last = parts.len() - 1;
            if character != ',' {
                parts[last].push(character);
            } else if characters.next_if_eq(&',').is_some() {
                parts[last].push(',');
            } else {
                parts.push(String::new());
            }
        }
        let entries = parts
            .into_iter()
            .map(|part| match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (part, None),
            })
            .collect();
        Keys { entries, syntax }
    }

    /// Takes `key=value`. An empty value is none.
    pub fn value(&mut self, key: &str) -> Result<Option<String>, String> {
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
        let own: Vec<(String, Option<String>)> = own;
        own.into_iter()
            .map(|(_, value)| match value {
                Some(value) if !value.is_empty() => Ok(value),
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

    fn take(&mut self, key: &str) -> Result<Option<Option<String>>, String> {
        let mut found = None;
        while let Some(at) = self.entries.iter().position(|(name, _)| name == key) {
            if found.replace(self.entries.remove(at).1).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        Ok(found)
    }
}

/// Writes a value as [`Keys::parse`] reads it.
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}
