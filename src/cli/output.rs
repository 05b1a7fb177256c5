//! What verbs print, and the files that they write.

use std::fmt::Display;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use mayfly_text::printable;
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::failure::{Class, Failure, OrFail};

/// One line on standard error. Nobody may be there to read it.
pub fn report(message: &impl Display) {
    let message = message.to_string();
    if message.is_empty() {
        return; // nobody is to be told
    }
    let _ = writeln!(std::io::stderr(), "mayfly: {message}");
}

/// Writes a file that takes the place of an older one whole: VMs may have that
/// one mapped.
pub fn replace(path: &Path, data: &[u8]) -> io::Result<()> {
    if path.exists() && !path.is_file() {
        return fs::write(path, data); // a pipe, a device
    }
    let folder = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let mut file = NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
    file.write_all(data)?;
    file.as_file()
        .set_permissions(Permissions::from_mode(0o644))?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// Prints a line.
pub fn print(line: &str) -> Result<(), Failure> {
    print_bytes(&[line.as_bytes(), b"\n"].concat())
}

/// Prints a document, as one line. What guests and images say in it moves no terminal.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(&json_text(serde_json::to_string(value))?)
}

/// Prints a document for people: on many lines.
pub fn print_pretty_json(value: &impl Serialize) -> Result<(), Failure> {
    print(&json_text(serde_json::to_string_pretty(value))?)
}

fn json_text(document: serde_json::Result<String>) -> Result<String, Failure> {
    Ok(printable::json(&document.or_internal("JSON")?))
}

/// Prints something, at once. That its reader has gone is no news, but there is no use
/// in going on either.
pub fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut output = io::stdout().lock();
    printed(output.write_all(bytes).and_then(|()| output.flush()))
}

/// What comes of printing.
fn printed(result: io::Result<()>) -> Result<(), Failure> {
    result.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::new(Class::ReaderGone, ""),
        _ => Failure::host(format!("standard output: {error}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_guests_and_images_say_in_json_moves_no_terminal() {
        let vm = serde_json::json!({ "labels": { "a": "\u{9b}2J\u{202e}" } });
        let text = json_text(serde_json::to_string(&vm)).unwrap();
        assert_eq!(text, r#"{"labels":{"a":"\u009b2J\u202e"}}"#);
    }

    /// No verb has a way of its own.
    #[test]
    fn all_json_is_printed_by_the_same_function() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli");
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let text = fs::read_to_string(&path).unwrap();
            let own = path.ends_with("output.rs");
            assert!(own || !text.contains("serde_json::to_string"), "{path:?}");
        }
    }
}
