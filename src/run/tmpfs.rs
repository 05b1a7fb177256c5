//! Memory as a directory: `--tmpfs`, and mounts of that kind.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use mayfly_protocol::agent::{Mount, Source};

use super::wish;
use crate::config::parse_size;
use crate::failure::Failure;

/// `DIR[:OPTIONS]`.
pub fn tmpfs(text: &OsStr) -> Result<Mount, Failure> {
    let bytes = text.as_bytes();
    let failed = |reason: &str| Failure::config(format!("--tmpfs {}: {reason}", text.display()));
    let (target, options) = match bytes.iter().position(|&byte| byte == b':') {
        Some(at) => (&bytes[..at], &bytes[at + 1..]),
        None => (bytes, &[][..]),
    };
    let target = wish::target(target).map_err(|why| failed(&why))?;
    let options = std::str::from_utf8(options).unwrap_or("?");
    memory(&target, options).map_err(|why| failed(&why))
}

/// Memory as a folder, with options of tmpfs(5).
pub fn memory(target: &[u8], options: &str) -> Result<Mount, String> {
    let mut data = vec!["mode=1777".to_owned()];
    let (mut read_only, mut no_exec) = (false, false);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("size", size)) => {
                let size = parse_size(size, 0)?;
                data.push(format!("size={size}"));
            }
            Some(("mode", mode)) if u32::from_str_radix(mode, 8).is_ok() => {
                data.push(option.to_owned());
            }
            Some(("uid" | "gid", number)) if number.parse::<u32>().is_ok() => {
                data.push(option.to_owned());
            }
            None if option == "ro" => read_only = true,
            None if option == "noexec" => no_exec = true,
            // As it is anyway.
            None if ["rw", "exec", "nosuid", "nodev"].contains(&option) => {}
            _ => {
                return Err(
                    "write size=64M, mode=1777, uid=0, gid=0, ro, noexec, nosuid, nodev".into(),
                );
            }
        }
    }
    Ok(Mount {
        target: target.into(),
        source: Source::Tmpfs {
            options: data.join(","),
            no_exec,
        },
        read_only,
    })
}
