//! What `execve` is given, and why it refused that.
//!
//! The standard library's `execvp` has a shell execute what the kernel does not know as a
//! program: an empty file would succeed, and a program for another CPU be a list of
//! commands. Here, as in Docker, that is an error.

#![allow(unsafe_code, reason = "execve")]

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mayfly_guest::program;
use mayfly_protocol::agent::{Bytes, Failed};

const STATUS_NOT_EXECUTABLE: u8 = 126;
const STATUS_NOT_FOUND: u8 = 127;
/// Where a program is looked for whose environment has no `PATH`.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program, its arguments and its environment.
pub struct Command {
    name: Bytes,
    /// The paths at which the program may be, in the order of the search.
    paths: Vec<CString>,
    arguments: Strings,
    environment: Strings,
}

/// Strings and pointers to them, with a null behind the last.
struct Strings {
    pointers: Vec<*const libc::c_char>,
    _strings: Vec<CString>,
}

// SAFETY: the pointers are to what lies beside them, on the heap, and nothing changes it.
unsafe impl Send for Strings {}
// SAFETY: as above.
unsafe impl Sync for Strings {}

impl Strings {
    fn new(strings: Vec<CString>) -> Self {
        let pointers = strings.iter().map(|string| string.as_ptr());
        Strings {
            pointers: pointers.chain([std::ptr::null()]).collect(),
            _strings: strings,
        }
    }
}

impl Command {
    /// A command; an error if a string of it has a NUL.
    pub fn new(arguments: &[Bytes], environment: &[(Bytes, Bytes)]) -> io::Result<Self> {
        let name = arguments.first().cloned().unwrap_or_default();
        let variable = |wanted: &[u8]| {
            let found = environment.iter().find(|(name, _)| name == wanted);
            found.map(|(_, value)| value.as_slice())
        };
        let paths = paths(&name, variable(b"PATH").unwrap_or(DEFAULT_PATH));
        let strings = |all: Vec<Bytes>| -> io::Result<Vec<CString>> {
            Ok(all
                .into_iter()
                .map(CString::new)
                .collect::<Result<_, _>>()?)
        };
        let pairs = environment.iter();
        let pairs = pairs.map(|(name, value)| [name.as_slice(), b"=", value].concat());
        Ok(Command {
            paths: strings(paths)?,
            arguments: Strings::new(strings(arguments.to_vec())?),
            environment: Strings::new(strings(pairs.collect())?),
            name,
        })
    }

    /// Becomes the program; returns if it can't. Neither allocates nor locks anything, as
    /// it runs between fork and exec.
    pub fn execute(&self) -> io::Error {
        let mut refused = libc::ENOENT;
        for path in &self.paths {
            // SAFETY: strings, and lists of them with a null at the end, that live here.
            unsafe {
                libc::execve(
                    path.as_ptr(),
                    self.arguments.pointers.as_ptr(),
                    self.environment.pointers.as_ptr(),
                )
            };
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // Another folder may have it.
                Some(libc::ENOENT | libc::ENOTDIR | libc::ESTALE) => {}
                Some(libc::EACCES) => refused = libc::EACCES,
                _ => return error,
            }
        }
        io::Error::from_raw_os_error(refused)
    }

    /// Why it did not become the program, in the user's words.
    pub fn explain(&self, error: &io::Error) -> Failed {
        let name = String::from_utf8_lossy(&self.name).into_owned();
        let fail = |status, why: &str| Failed {
            status,
            reason: format!("{name}: {why}"),
        };
        let paths = || {
            let paths = self.paths.iter();
            paths.map(|path| Path::new(OsStr::from_bytes(path.as_bytes())))
        };
        match error.raw_os_error() {
            Some(libc::ENOENT) => {
                let interpreter = paths().find_map(missing_interpreter);
                let why = interpreter.map_or("not found".to_owned(), |interpreter| {
                    format!("its interpreter {interpreter} is not in the image")
                });
                fail(STATUS_NOT_FOUND, &why)
            }
            Some(libc::EACCES) if paths().any(Path::is_dir) => {
                fail(STATUS_NOT_EXECUTABLE, "is a directory")
            }
            Some(libc::ENOEXEC) => {
                let head = paths().find_map(|path| head(path).ok());
                let why = match head.as_deref() {
                    Some([]) => "it is empty: ",
                    Some(head) if program::is_foreign(head) => "it is for another CPU: ",
                    _ => "",
                };
                fail(STATUS_NOT_EXECUTABLE, &format!("{why}Exec format error"))
            }
            _ => fail(STATUS_NOT_EXECUTABLE, &plain(error)),
        }
    }
}

/// Where a program may be: as it is written if there is a slash in it, else in the folders
/// of `PATH`, of which an empty one is the current folder.
fn paths(name: &[u8], path: &[u8]) -> Vec<Bytes> {
    match name {
        b"" => Vec::new(),
        name if name.contains(&b'/') => vec![name.to_vec()],
        name => {
            let folders = path.split(|&byte| byte == b':');
            let joined = folders.map(|folder| match folder {
                b"" => name.to_vec(),
                folder => [folder, b"/", name].concat(),
            });
            joined.collect()
        }
    }
}

/// An error's text without its number.
pub fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}

/// What is to execute a program that is there, and is not there itself.
fn missing_interpreter(path: &Path) -> Option<String> {
    let head = head(path).ok()?;
    let interpreter = program::interpreter(&head)?;
    let missing = fs::metadata(OsStr::from_bytes(interpreter)).is_err();
    // With the carriage return that an editor may have left.
    missing.then(|| {
        let interpreter = String::from_utf8_lossy(interpreter);
        interpreter.escape_debug().to_string()
    })
}

/// The beginning of a file; an error for what else there is.
fn head(path: &Path) -> io::Result<Vec<u8>> {
    // A named pipe would have it wait for ever.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut head = Vec::new();
    file.take(program::HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    #[test]
    fn programs_are_looked_for_as_execvp_does() {
        let found = |name: &str, path: &str| {
            let paths = paths(name.as_bytes(), path.as_bytes()).into_iter();
            let paths = paths.map(|path| String::from_utf8(path).unwrap());
            paths.collect::<Vec<_>>().join(" ")
        };
        for (name, path, expected) in [
            ("sh", "/bin:/usr/bin", "/bin/sh /usr/bin/sh"),
            ("sh", ":/bin", "sh /bin/sh"),
            ("a/sh", "/bin", "a/sh"),
            ("/sh", "/bin", "/sh"),
            ("", "/bin", ""),
        ] {
            assert_eq!(found(name, path), expected, "{name} {path}");
        }
        assert!(Command::new(&[b"a\0".to_vec()], &[]).is_err());
    }

    /// What becomes of a command: its output, or why it did not start.
    fn outcome(words: &[&str], path: &str) -> Result<String, Failed> {
        let words: Vec<Bytes> = words.iter().map(|word| word.as_bytes().to_vec()).collect();
        let environment = [(b"PATH".to_vec(), path.as_bytes().to_vec())];
        let command = std::sync::Arc::new(Command::new(&words, &environment).unwrap());
        let mut child = std::process::Command::new("/");
        let within = command.clone();
        // SAFETY: system calls alone.
        unsafe { child.pre_exec(move || Err(within.execute())) };
        match child.output() {
            Ok(output) => Ok(String::from_utf8(output.stdout).unwrap()),
            Err(error) => Err(command.explain(&error)),
        }
    }

    #[test]
    fn what_the_kernel_does_not_execute_is_refused_and_why() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, content: &[u8], mode| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let mut arm = b"\x7fELF\x02\x01\x01".to_vec();
        arm.resize(16, 0);
        arm.extend([2, 0, 183, 0]);
        arm.resize(64, 0);
        put("a/empty", b"", 0o755);
        put("a/arm", &arm, 0o755);
        put("a/plain", b"echo from-sh\n", 0o755);
        put("a/dos", b"#!/bin/sh\r\necho\r\n", 0o755);
        put("a/closed", b"#!/bin/sh\n", 0o644);
        put("a/twice", b"", 0o644);
        put("b/twice", b"#!/bin/sh\necho b\n", 0o755);
        put("a/folder/x", b"", 0o644);
        let root = folder.path().display();
        let path = format!("{root}/none:{root}/a/empty:{root}/a:{root}/b");
        for (name, status, why) in [
            ("empty", 126, "it is empty: Exec format error"),
            ("arm", 126, "it is for another CPU: Exec format error"),
            ("plain", 126, "Exec format error"),
            ("dos", 127, r"its interpreter /bin/sh\r is not in the image"),
            ("closed", 126, "Permission denied"),
            ("folder", 126, "is a directory"),
            ("nowhere", 127, "not found"),
            ("/nowhere/x", 127, "not found"),
            ("/dev/null/x", 127, "not found"),
            ("", 127, "not found"),
        ] {
            let failed = outcome(&[name], &path).unwrap_err();
            let expected = Failed {
                status,
                reason: format!("{name}: {why}"),
            };
            assert_eq!(failed, expected);
        }
        // What may not be executed does not hide what may.
        assert_eq!(outcome(&["twice"], &path).unwrap(), "b\n");
        assert_eq!(
            outcome(&["sh", "-c", "echo $1$PATH", "x", "y"], "/bin").unwrap(),
            "y/bin\n"
        );
    }
}
