//! Whose users and groups are the container's.

use std::fs;
use std::io::{self, ErrorKind};
use std::process::{Command, Stdio};

use mayfly_sandbox::credentials::Ids;

use crate::error::{Context, Error};

/// The mapping of users inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mapping {
    /// The caller's, or a range that was given to the caller: root and all others.
    Many = b'm',
    /// The command's alone, who is the caller outside.
    One = b'o',
}

impl Mapping {
    /// Of what is told to the process inside.
    pub fn told([byte]: [u8; 1]) -> Self {
        match byte {
            b'm' => Mapping::Many,
            _ => Mapping::One,
        }
    }
}

/// Maps the users of a process's new user namespace, and says what is not as Docker has it.
///
/// Root's container has the host's users, as Docker's default, so that the image's files
/// belong to whom they should; another user's has that user as root, and those that
/// `/etc/subuid` gives to the user as others.
pub fn map(
    pid: libc::pid_t,
    caller: Ids,
    (uid, gid): (u32, u32),
) -> Result<(Mapping, Option<String>), Error> {
    if caller.uid == 0 {
        for file in ["gid_map", "uid_map"] {
            let own = fs::read_to_string(format!("/proc/self/{file}")).or_host(file)?;
            write(pid, file, &identity(&own)).or_host(file)?;
        }
        return Ok((Mapping::Many, None));
    }
    let why = match subordinate(pid, caller) {
        Ok(()) => return Ok((Mapping::Many, None)),
        Err(why) => why,
    };
    // Without privileges, groups must stay as they are (user_namespaces(7)).
    write(pid, "setgroups", "deny").or_host(format_args!("users: {why}; setgroups"))?;
    write(pid, "gid_map", &format!("{gid} {} 1\n", caller.gid)).or_host("gid_map")?;
    write(pid, "uid_map", &format!("{uid} {} 1\n", caller.uid)).or_host("uid_map")?;
    Ok((
        Mapping::One,
        Some(format!(
            "users: the command's is the only one inside: {why}"
        )),
    ))
}

fn write(pid: libc::pid_t, file: &str, text: &str) -> io::Result<()> {
    fs::write(format!("/proc/{pid}/{file}"), text)
}

/// Maps all users that there are to themselves.
fn identity(own: &str) -> String {
    let mut map = String::new();
    for line in own.lines() {
        let mut fields = line.split_whitespace();
        if let (Some(first), Some(_), Some(count)) = (fields.next(), fields.next(), fields.next()) {
            map.push_str(&format!("{first} {first} {count}\n"));
        }
    }
    map
}

/// Maps root to the caller and others to the caller's subordinate users, by the programs
/// that may.
fn subordinate(pid: libc::pid_t, caller: Ids) -> Result<(), String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let name = read("/etc/passwd")
        .ok()
        .and_then(|it| name(&it, caller.uid));
    for (program, file, own) in [
        ("newgidmap", "/etc/subgid", caller.gid),
        ("newuidmap", "/etc/subuid", caller.uid),
    ] {
        let (first, count) = range(&read(file)?, caller.uid, name.as_deref())
            .ok_or_else(|| format!("{file} has none for this user"))?;
        let mut command = Command::new(program);
        command.arg(pid.to_string());
        command.args(["0", &own.to_string(), "1", "1"]);
        command.args([first.to_string(), count.to_string()]);
        command.stdin(Stdio::null());
        let output = command.output().map_err(|error| match error.kind() {
            ErrorKind::NotFound => format!("{program} is not installed"),
            _ => format!("{program}: {error}"),
        })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{program}: {}", said.trim()));
        }
    }
    Ok(())
}

/// A user's name, of `passwd(5)`.
fn name(passwd: &str, uid: u32) -> Option<String> {
    let mut users = passwd.lines().map(|line| line.split(':'));
    users.find_map(|mut fields| {
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// The first range of a user's, of `subuid(5)`.
fn range(file: &str, uid: u32, name: Option<&str>) -> Option<(u32, u32)> {
    let mut lines = file.lines().map(|line| line.split(':'));
    lines.find_map(|mut fields| {
        let owner = fields.next()?;
        let its = Some(owner) == name || owner.parse() == Ok(uid);
        let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        (its && count > 0).then_some((first, count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_is_mapped_to_themselves() {
        let own = "         0          0 4294967295\n";
        assert_eq!(identity(own), "0 0 4294967295\n");
        assert_eq!(identity("0 1000 1\n1 100000 65536\n"), "0 0 1\n1 1 65536\n");
    }

    #[test]
    fn subordinate_users_are_by_name_or_number() {
        let passwd = "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n";
        assert_eq!(name(passwd, 1000).as_deref(), Some("ann"));
        assert_eq!(name(passwd, 1), None);
        let file = "bob:1:2\nann:100000:65536\n1001:200000:7\nbad\nnone:5:0\n";
        assert_eq!(range(file, 1000, Some("ann")), Some((100_000, 65536)));
        assert_eq!(range(file, 1001, None), Some((200_000, 7)));
        assert_eq!(range(file, 1002, Some("none")), None);
    }
}
