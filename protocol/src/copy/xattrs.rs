//! Extended attributes, as far as they mean the same elsewhere: a file's capabilities, its
//! access control lists, and what users wrote. Labels of a host's SELinux, and what
//! overlayfs notes for itself, stay where they are.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{XattrFlags, fgetxattr, flistxattr, flistxattr_query, fsetxattr};
use rustix::io::Errno;

use super::keep::Keep;
use crate::agent::Bytes;

/// Names and values.
pub type Xattrs = Vec<(Bytes, Bytes)>;

/// The most that an entry has of names and values together.
pub const LEN_MAX: usize = 128 << 10;
/// Linux' own limits of a name, of a value, and of a file's names (`linux/limits.h`).
const NAME_MAX: usize = 255;
const VALUE_MAX: usize = 64 << 10;
const LIST_MAX: usize = 64 << 10;

const USER: &[u8] = b"user.";
const CAPABILITY: &[u8] = b"security.capability";
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// One that is copied.
pub fn is_known(name: &[u8]) -> bool {
    name == CAPABILITY || ACLS.contains(&name) || (name.starts_with(USER) && name != USER)
}

/// Those that name no users.
pub fn without_owners(mut xattrs: Xattrs) -> Xattrs {
    xattrs.retain(|(name, _)| !ACLS.contains(&name.as_slice()));
    xattrs
}

/// The bytes of all names and values together.
pub fn len(xattrs: &[(Bytes, Bytes)]) -> usize {
    let lens = xattrs.iter().map(|(name, value)| name.len() + value.len());
    lens.sum()
}

/// Refuses what no file has.
pub fn check(xattrs: &[(Bytes, Bytes)]) -> io::Result<()> {
    let sound = |(name, value): &(Bytes, Bytes)| {
        is_known(name) && name.len() <= NAME_MAX && !name.contains(&0) && value.len() <= VALUE_MAX
    };
    match xattrs.iter().all(sound) && len(xattrs) <= LEN_MAX {
        true => Ok(()),
        false => Err(io::Error::other("extended attributes that cannot be")),
    }
}

/// Those of a file or folder that are copied.
pub fn of(fd: impl AsFd) -> io::Result<Xattrs> {
    let len = match flistxattr_query(&fd) {
        Ok(0) | Err(Errno::NOTSUP | Errno::NOSYS) => return Ok(Xattrs::new()),
        Err(error) => return Err(error.into()),
        Ok(len) => len,
    };
    // There may be more by now.
    let mut list = vec![0; len.saturating_mul(2).min(LIST_MAX)];
    let len = flistxattr(&fd, &mut list[..])?;
    list.truncate(len);
    let mut found = Xattrs::new();
    let mut value = Vec::new();
    for name in list.split(|&byte| byte == 0).filter(|name| is_known(name)) {
        value.resize(VALUE_MAX, 0);
        match fgetxattr(&fd, name, &mut value[..]) {
            Ok(len) => found.push((name.to_vec(), value.iter().take(len).copied().collect())),
            // Gone meanwhile.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match self::len(&found) <= LEN_MAX {
        true => Ok(found),
        false => Err(io::Error::other(
            "has more than 128 KiB of extended attributes",
        )),
    }
}

/// Gives a file or folder those that are to be kept, as far as its file system has any:
/// lists of owners go where owners go, and capabilities are special.
pub fn set(fd: impl AsFd, xattrs: &[(Bytes, Bytes)], keep: Keep) -> io::Result<()> {
    for (name, value) in xattrs {
        let kept = match name.as_slice() {
            CAPABILITY => keep.special,
            name if ACLS.contains(&name) => keep.owners,
            _ => true,
        };
        if !kept {
            continue;
        }
        match fsetxattr(&fd, name.as_slice(), value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
