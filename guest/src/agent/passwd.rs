//! Users and groups, as an image's own files name them (`passwd(5)`, `group(5)`).

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// The credentials of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// The primary group's number.
    pub gid: u32,
    /// All groups, that one first.
    pub groups: Vec<u32>,
    /// Its folder.
    pub home: String,
}

/// How many groups a process can be in, less its first (Linux' `NGROUPS_MAX`).
const GROUPS_MAX: usize = 65_535;
/// More than any list of users. A larger one is not read further.
const LIST_MAX: u64 = 64 << 20;

/// Finds `USER[:GROUP]`, by names or numbers; nothing is root. Others are groups that it
/// is in, too.
pub fn find(text: &str, others: &[String]) -> Result<User, String> {
    let (passwd, group) = (list("/etc/passwd"), list("/etc/group"));
    let (passwd, group) = (
        String::from_utf8_lossy(&passwd),
        String::from_utf8_lossy(&group),
    );
    let mut user = find_in(text, &passwd, &group)?;
    for other in others {
        let gid = find_group(other, &group)?;
        if !user.groups.contains(&gid) {
            user.groups.push(gid);
        }
    }
    Ok(user)
}

/// A file of the image; nothing for one that is missing, or is no file.
fn list(path: &str) -> Vec<u8> {
    let mut list = Vec::new();
    // A named pipe would have it wait for ever.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    if let Ok(file) = file
        && file.metadata().is_ok_and(|file| file.is_file())
    {
        let _ = file.take(LIST_MAX).read_to_end(&mut list);
    }
    list
}

/// A line of `/etc/passwd`.
#[derive(Clone, Copy)]
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// A line of `/etc/group`.
#[derive(Clone, Copy)]
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Lines that are meant: not comments, nor those of which nobody knows what they mean.
/// The fields at a line's end may be missing, as in Docker.
fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(':').map(str::trim);
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = match fields.next() {
            None | Some("") => 0,
            Some(gid) => gid.parse().ok()?,
        };
        let home = fields.nth(1).unwrap_or_default();
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
    })
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(':').map(str::trim);
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or_default();
        Some(Group { name, gid, members })
    })
}

fn lines(list: &str) -> impl Iterator<Item = &str> {
    let lines = list.lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// A number that a user or a group can have: Linux takes the last one for none.
fn number(text: &str) -> Result<Option<u32>, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(number) if digits && number != u32::MAX => Ok(Some(number)),
        _ if digits => Err(format!(
            "{text} is not the number of a user or a group: write 0 to 4294967294"
        )),
        _ => Ok(None),
    }
}

fn find_group(wanted: &str, group: &str) -> Result<u32, String> {
    if let Some(gid) = number(wanted)? {
        return Ok(gid);
    }
    let found = groups(group).find(|group| group.name == wanted);
    let missing = || format!("no group {wanted} in the image's /etc/group");
    found.map(|group| group.gid).ok_or_else(missing)
}

fn find_in(text: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user, wanted) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    // What looks like a number is one, as in Docker, though there be such a name.
    let uid = number(user)?;
    let account = accounts(passwd).find(|account| match uid {
        Some(uid) => account.uid == uid,
        None => account.name == user,
    });
    let account = match (account, uid) {
        (Some(account), _) => account,
        (None, Some(uid)) => Account {
            name: "",
            uid,
            gid: 0,
            home: "/",
        },
        (None, None) => return Err(format!("no user {user} in the image's /etc/passwd")),
    };
    let (gid, mut others) = match wanted {
        Some(wanted) => (find_group(wanted, group)?, Vec::new()),
        None => {
            let has = |group: &Group| {
                let mut members = group.members.split(',').map(str::trim);
                !account.name.is_empty() && members.any(|member| member == account.name)
            };
            let others = groups(group).filter(has).map(|group| group.gid);
            (account.gid, others.take(GROUPS_MAX).collect())
        }
    };
    // What is denied to a group would else be allowed to its members by a file's mode for
    // others; Docker has it so, too.
    others.insert(0, gid);
    let mut seen = HashSet::new();
    others.retain(|&gid| seen.insert(gid));
    Ok(User {
        uid: account.uid,
        gid,
        groups: others,
        home: match account.home {
            "" => "/".to_owned(),
            home => home.to_owned(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:w:/srv:/bin/no\n\
        12:x:7:8::/h:\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlog:x:50:web,root\nadm:x:51:root\nbroken:x\n";

    fn user(uid: u32, groups: &[u32], home: &str) -> User {
        User {
            uid,
            gid: groups[0],
            groups: groups.to_vec(),
            home: home.into(),
        }
    }

    #[test]
    fn users_and_groups() {
        for (text, expected) in [
            ("", user(0, &[0, 50, 51], "/root")),
            ("web", user(33, &[34, 50], "/srv")),
            ("33", user(33, &[34, 50], "/srv")),
            ("web:", user(33, &[34, 50], "/srv")),
            ("web:log", user(33, &[50], "/srv")),
            ("web:99", user(33, &[99], "/srv")),
            ("1000", user(1000, &[0], "/")),
            ("1000:1000", user(1000, &[1000], "/")),
            (":log", user(0, &[50], "/root")),
            // A number, though a user is called so.
            ("12", user(12, &[0], "/")),
            ("7", user(7, &[8], "/h")),
            ("4294967294", user(u32::MAX - 1, &[0], "/")),
        ] {
            assert_eq!(find_in(text, PASSWD, GROUP).unwrap(), expected, "{text}");
        }
        for bad in [
            "nobody",
            "web:nobody",
            "-1",
            "+1",
            "4294967295",
            "4294967296",
            "0:4294967295",
            "99999999999999999999999",
        ] {
            assert!(find_in(bad, PASSWD, GROUP).is_err(), "{bad}");
        }
        assert_eq!(find_group("log", GROUP), Ok(50));
        assert_eq!(find_group("7", GROUP), Ok(7));
        assert!(find_group("nobody", GROUP).is_err());
        assert_eq!(find_in("5", "", "").unwrap(), user(5, &[0], "/"));
        assert_eq!(find_in("", "", "").unwrap().home, "/");
    }

    #[test]
    fn lists_are_taken_as_they_are_found() {
        let long = format!("x{}:x:9:9::/:\n", "y".repeat(100_000));
        let passwd = format!(
            "# web:x:1:1::/comment:\n\n  # and this\n+::::::\n{long}\
             web:x:33:34::/first:/bin/sh\r\nweb:x:44:45::/second:\n\
             :x:5:6::/nameless:\nfew:x:70\nless:x:71:72\nwrong:x:a:b::/:\n\
             neg:x:-1:0::/:\n  blank : x : 80 : 81 :: /b :\nlast:x:90:91::/last"
        );
        let group = "#log:x:1:web\nlog:x:50: web , few\nlog:x:51:web\nweb:x:34:web\n\
                     many:x:x:web\nlast:x:91:web";
        for (text, expected) in [
            ("web", user(33, &[34, 50, 51, 91], "/first")),
            ("44", user(44, &[45, 50, 51, 34, 91], "/second")),
            ("few", user(70, &[0, 50], "/")),
            ("less", user(71, &[72], "/")),
            ("blank", user(80, &[81], "/b")),
            ("last:last", user(90, &[91], "/last")),
            ("5", user(5, &[6], "/nameless")),
        ] {
            assert_eq!(find_in(text, &passwd, group).unwrap(), expected, "{text}");
        }
        for bad in ["wrong", "neg", "#", "# web", "+", "web:many", "web:#log"] {
            assert!(find_in(bad, &passwd, group).is_err(), "{bad}");
        }
    }
}
