//! The environment of what runs in a VM: from its image, from files, from flags.

use std::collections::HashSet;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::failure::{Failure, OrFail};

/// What an image's command is looked for in, where the image does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What a file may begin with that was written on Windows.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Names and values.
pub type Variables = Vec<(Vec<u8>, Vec<u8>)>;

/// The user's variables: those of `--env-file`, then those of `-e`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes<'a> {
    /// `NAME=VALUE`, or `NAME` for the host's own value.
    pub flags: &'a [OsString],
    /// Those that [`of_files`] found.
    pub from_files: &'a [OsString],
    /// The command has a terminal.
    pub terminal: bool,
}

impl Wishes<'_> {
    /// What they add to what is there; the last one of a name wins.
    pub fn onto(&self, mut all: Variables) -> Result<Variables, Failure> {
        for text in self.from_files {
            all.extend(variable(text.as_bytes()));
        }
        for text in self.flags {
            let bytes = text.as_bytes();
            let name = bytes.split(|&byte| byte == b'=').next().unwrap_or_default();
            if name.is_empty() {
                return Err(Failure::config(format!(
                    "-e {}: has no name; write NAME=VALUE, or NAME for the host's own value",
                    text.display()
                )));
            }
            all.extend(variable(bytes));
        }
        Ok(last_of_each(all))
    }

    /// What a terminal's programs want to know.
    pub fn terminal(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let kind = || env::var_os("TERM").unwrap_or_else(|| "xterm".into());
        self.terminal.then(|| (b"TERM".to_vec(), kind().into_vec()))
    }
}

/// What every command has, and what its image adds. The image is somebody else's: an
/// entry of it without a value gets none of the host's, and is left out.
pub fn of_image(entries: &[String], hostname: &str, wishes: &Wishes) -> Variables {
    let mut all: Variables = vec![(b"PATH".into(), PATH.into())];
    all.push((b"HOSTNAME".into(), hostname.into()));
    all.extend(wishes.terminal());
    let entries = entries.iter().filter_map(|entry| image_entry(entry));
    all.extend(entries.map(|(name, value)| (name.into(), value.into())));
    all
}

/// An image's variable, if it is one.
pub fn image_entry(entry: &str) -> Option<(&str, &str)> {
    let (name, value) = entry.split_once('=')?;
    (!name.is_empty() && !entry.contains('\0')).then_some((name, value))
}

/// `NAME=VALUE`, or `NAME` for the host's own value, if it has one.
fn variable(text: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    match text.iter().position(|&byte| byte == b'=') {
        Some(at) => {
            let (name, value) = text.split_at(at);
            Some((name.to_vec(), value.get(1..).unwrap_or_default().to_vec()))
        }
        None => {
            let value = env::var_os(OsStr::from_bytes(text))?;
            Some((text.to_vec(), value.into_vec()))
        }
    }
}

/// The variables of `--env-file`, each as `NAME=VALUE`. A file may be a pipe, from which
/// they come but once.
pub fn of_files(paths: &[PathBuf]) -> Result<Vec<OsString>, Failure> {
    let mut all = Vec::new();
    for path in paths {
        let found = of_file(path)?.into_iter();
        all.extend(found.map(|(name, value)| OsString::from_vec([name, value].join(&b'='))));
    }
    Ok(all)
}

/// The variables of a file, as Docker reads it: blanks before a name and lines with a
/// `#` mean nothing, blanks in a name or behind it are a mistake.
fn of_file(path: &PathBuf) -> Result<Variables, Failure> {
    let flag = format!("--env-file {}", path.display());
    let text = fs::read(path).or_config(&flag)?;
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
    let mut all = Variables::new();
    for (number, line) in (1..).zip(text.split(|&byte| byte == b'\n')) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let blank = |byte: &u8| b" \t".contains(byte);
        let start = line.iter().position(|byte| !blank(byte));
        let line = line.get(start.unwrap_or(line.len())..).unwrap_or_default();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let name = line.split(|&byte| byte == b'=').next().unwrap_or_default();
        // Values may be secrets, and are not shown.
        let wrong = match name {
            [] => Some("has no name".to_owned()),
            _ if name.iter().any(blank) => {
                let name = String::from_utf8_lossy(name);
                Some(format!("the name {name:?} has a blank in it"))
            }
            _ if line.contains(&0) => Some("has a NUL in it".to_owned()),
            _ => None,
        };
        if let Some(wrong) = wrong {
            return Err(Failure::config(format!(
                "{flag}: line {number}: {wrong}; write NAME=VALUE"
            )));
        }
        all.extend(variable(line));
    }
    Ok(all)
}

fn last_of_each(all: Variables) -> Variables {
    let mut seen = HashSet::new();
    let mut last: Variables = all.into_iter().rev().collect();
    last.retain(|(name, _)| seen.insert(name.clone()));
    last.reverse();
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &[u8]) -> Result<Variables, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        fs::write(&path, text).unwrap();
        of_file(&path).map_err(|failure| failure.to_string())
    }

    #[test]
    fn an_image_gets_nothing_of_the_host_s() {
        // Every test's process has it.
        let named = env::var("PATH").unwrap();
        let entries = ["A=1", "PATH", "", "=x", "B=x=y", "C=\0", "E="].map(str::to_owned);
        let all = of_image(&entries, "h", &Wishes::default());
        let values: Vec<_> = all.iter().map(|(_, value)| value.clone()).collect();
        assert!(!values.contains(&named.into_bytes()));
        let expected: [(&str, &str); 5] = [
            ("PATH", PATH),
            ("HOSTNAME", "h"),
            ("A", "1"),
            ("B", "x=y"),
            ("E", ""),
        ];
        let expected = expected.map(|(name, value)| (name.into(), value.into()));
        assert_eq!(all, expected);
    }

    #[test]
    fn the_user_s_own_variables_are_bytes_and_may_come_from_the_host() {
        let flags = ["A=1", "PATH", "MAYFLY_TEST_HAS_NOT_THIS", "A=2"].map(OsString::from);
        let mut flags = flags.to_vec();
        flags.push(OsString::from_vec(b"B=\xfc".to_vec()));
        let wishes = Wishes {
            flags: &flags,
            ..Wishes::default()
        };
        let all = wishes.onto(vec![(b"A".into(), b"0".into())]).unwrap();
        let own = env::var_os("PATH").unwrap().into_vec();
        let expected: Variables = vec![
            (b"PATH".into(), own),
            (b"A".into(), b"2".into()),
            (b"B".into(), b"\xfc".into()),
        ];
        assert_eq!(all, expected);
        for text in ["", "=x"] {
            let flags = [text.into()];
            let wishes = Wishes {
                flags: &flags,
                ..Wishes::default()
            };
            let refused = wishes.onto(Vec::new()).unwrap_err().to_string();
            assert!(refused.contains("has no name"), "{refused}");
        }
    }

    #[test]
    fn files_are_read_as_docker_reads_them() {
        let text = b"\xef\xbb\xbfA=1\r\n  # no\n\n\t B= x \n#C=1\nD=a b=\"c\"\nE=\xfc\nPATH\nF=";
        let own = env::var_os("PATH").unwrap().into_vec();
        let expected: Variables = vec![
            (b"A".into(), b"1".into()),
            (b"B".into(), b" x ".into()),
            (b"D".into(), b"a b=\"c\"".into()),
            (b"E".into(), b"\xfc".into()),
            (b"PATH".into(), own),
            (b"F".into(), b"".into()),
        ];
        assert_eq!(file(text).unwrap(), expected);
        for (text, told) in [
            (
                &b"export C=3"[..],
                "line 1: the name \"export C\" has a blank",
            ),
            (b"A=1\nB = 2\n", "line 2: the name \"B \" has a blank"),
            (b"A=1\n=secret\n", "line 2: has no name"),
            (b"A=\0", "line 1: has a NUL"),
        ] {
            let refused = file(text).unwrap_err();
            assert!(refused.contains(told), "{refused}");
            assert!(!refused.contains("secret"), "{refused}");
        }
    }
}
