//! Users and groups, as an image's own files name them (`passwd(5)`, `group(5)`).

use std::fs;

/// Who a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Groups beside it.
    pub groups: Vec<u32>,
    /// Its folder.
    pub home: String,
}

/// Finds `USER[:GROUP]`, by names or numbers; nothing is root. Others are groups that it
/// is in, too.
pub fn find(text: &str, others: &[String]) -> Result<User, String> {
    let read = |path| fs::read(path).unwrap_or_default();
    let (passwd, group) = (read("/etc/passwd"), read("/etc/group"));
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

fn groups(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid: u32 = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn find_group(group: &str, text: &str) -> Result<u32, String> {
    let number: Option<u32> = group.parse().ok();
    let found = groups(text).find(|&(name, gid, _)| name == group || number == Some(gid));
    let gid = found.map(|(_, gid, _)| gid).or(number);
    gid.ok_or_else(|| format!("no group {group} in the image's /etc/group"))
}

fn find_in(text: &str, passwd: &str, group_file: &str) -> Result<User, String> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number: Option<u32> = user.parse().ok();
    let entry = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid: u32 = fields.nth(1)?.parse().ok()?;
        let gid: u32 = fields.next()?.parse().ok()?;
        let home = fields.nth(1)?;
        // A name that looks like a number is a name first, as Docker has it.
        (name == user || number == Some(uid)).then_some((name, uid, gid, home))
    });
    let (name, uid, gid, home) = match (entry, number) {
        (Some(entry), _) => entry,
        (None, Some(uid)) => ("", uid, 0, "/"),
        (None, None) => return Err(format!("no user {user} in the image's /etc/passwd")),
    };
    let (gid, groups) = match group.filter(|group| !group.is_empty()) {
        Some(group) => (find_group(group, group_file)?, Vec::new()),
        None => {
            let has = |members: &str| !name.is_empty() && members.split(',').any(|it| it == name);
            let others = groups(group_file).filter(|&(_, _, members)| has(members));
            (gid, others.map(|(_, gid, _)| gid).collect())
        }
    };
    Ok(User {
        uid,
        gid,
        groups,
        home: if home.is_empty() { "/" } else { home }.to_owned(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:w:/srv:/bin/no\n12:x:7:8::/h:\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlog:x:50:web,root\nadm:x:51:root\nbroken:x\n";

    #[test]
    fn users_and_groups() {
        let user = |uid, gid, groups: &[u32], home: &str| User {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.into(),
        };
        for (text, expected) in [
            ("", user(0, 0, &[50, 51], "/root")),
            ("web", user(33, 34, &[50], "/srv")),
            ("33", user(33, 34, &[50], "/srv")),
            ("web:log", user(33, 50, &[], "/srv")),
            ("web:99", user(33, 99, &[], "/srv")),
            ("1000", user(1000, 0, &[], "/")),
            ("1000:1000", user(1000, 1000, &[], "/")),
            (":log", user(0, 50, &[], "/root")),
            ("12", user(7, 8, &[], "/h")),
        ] {
            assert_eq!(find_in(text, PASSWD, GROUP).unwrap(), expected, "{text}");
        }
        for bad in ["nobody", "web:nobody", "-1", "4294967296"] {
            assert!(find_in(bad, PASSWD, GROUP).is_err(), "{bad}");
        }
        assert_eq!(find_group("log", GROUP), Ok(50));
        assert_eq!(find_group("7", GROUP), Ok(7));
        assert!(find_group("nobody", GROUP).is_err());
        assert_eq!(find_in("5", "", "").unwrap(), user(5, 0, &[], "/"));
        assert_eq!(find_in("", "", "").unwrap().home, "/");
    }
}
