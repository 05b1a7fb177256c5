//! Paths below what is copied, and the longest that there are.

use std::io;

/// The longest name, in bytes (`NAME_MAX`).
pub const NAME_MAX: usize = 255;
/// The longest path, in bytes (`PATH_MAX`, without its NUL).
pub const PATH_MAX: usize = 4095;
/// How many folders lie in each other, at most: each is open.
pub const DEPTH_MAX: usize = 256;

/// The names in a path, of which none leads elsewhere.
pub fn names(path: &[u8]) -> io::Result<Vec<&[u8]>> {
    let refuse = |why: &str| Err(about(path, io::Error::other(why)));
    if path.is_empty() {
        return Ok(Vec::new());
    }
    if path.len() > PATH_MAX {
        return refuse("a path of more than 4095 bytes");
    }
    if path.contains(&0) {
        return refuse("a NUL in its name");
    }
    let names: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
    if names.len() > DEPTH_MAX {
        return refuse("lies more than 256 folders deep");
    }
    for name in &names {
        match *name {
            b"" | b"." | b".." => return refuse("no plain path"),
            name if name.len() > NAME_MAX => return refuse("a name of more than 255 bytes"),
            _ => {}
        }
    }
    Ok(names)
}

/// An error that names its file.
pub fn about(path: &[u8], error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    let path = String::from_utf8_lossy(path);
    io::Error::new(error.kind(), format!("{path}: {error}"))
}
