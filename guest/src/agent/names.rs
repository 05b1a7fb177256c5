//! The host name, `/etc/hosts` and `/etc/resolv.conf`, which each machine has of its own.

#![allow(unsafe_code, reason = "the machine's name")]

use std::ffi::CString;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;

use mayfly_protocol::agent::{Net, Setup};

use super::command::plain;
use super::directory::make_directory;
use crate::system::check;

/// As Docker writes it.
const HOSTS: &str = "127.0.0.1\tlocalhost\n\
                     ::1\tlocalhost ip6-localhost ip6-loopback\n\
                     fe00::0\tip6-localnet\n\
                     ff00::0\tip6-mcastprefix\n\
                     ff02::1\tip6-allnodes\n\
                     ff02::2\tip6-allrouters\n";
/// The address of a name without a network, as Debian has it.
const OWN_LOOPBACK: &str = "127.0.1.1";

/// Sets the host name, and writes it with its addresses to the image's files.
pub fn give(setup: &Setup) -> Result<(), String> {
    let name = &setup.hostname;
    set_name(name)?;
    let addresses = setup.net.iter().flat_map(|net| &net.addresses);
    let addresses: Vec<IpAddr> = addresses.map(|&(address, _)| address).collect();
    write("/etc/hosts", &hosts(name, &addresses, &setup.hosts))?;
    // What df and mount read where they are old; Docker makes it, too.
    let _ = symlink("/proc/mounts", "/etc/mtab");
    Ok(())
}

/// Renames a restored machine: the new name has the addresses of the old one.
pub fn rename(name: &str) -> Result<(), String> {
    let old = fs::read_to_string("/etc/hostname").unwrap_or_default();
    set_name(name)?;
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    write("/etc/hosts", &renamed(&hosts, old.trim(), name))
}

/// `/etc/hosts` with the machine's names replaced: its lines end with them.
fn renamed(hosts: &str, old: &str, new: &str) -> String {
    let (old, new) = (own_names(old), own_names(new));
    let mut text = String::new();
    for line in hosts.lines() {
        match line.strip_suffix(&old).filter(|rest| rest.ends_with('\t')) {
            Some(address) if !old.is_empty() => writeln!(text, "{address}{new}"),
            _ => writeln!(text, "{line}"),
        }
        .unwrap_or_default();
    }
    text
}

fn set_name(name: &str) -> Result<(), String> {
    let text = CString::new(name).map_err(|error| error.to_string())?;
    // SAFETY: a string that lives until the call returns, and its length.
    let named = unsafe { libc::sethostname(text.as_ptr(), name.len()) };
    check(named.into()).map_err(|error| format!("the name {name}: {error}"))?;
    write("/etc/hostname", &format!("{name}\n"))
}

/// Writes `/etc/resolv.conf`, if the host has name servers or options for it.
pub fn give_resolvers(net: &Net) -> Result<(), String> {
    let text = resolvers(net);
    match text.is_empty() {
        true => Ok(()),
        false => write("/etc/resolv.conf", &text),
    }
}

/// A name with a domain is also known without it.
fn own_names(name: &str) -> String {
    match name.split_once('.') {
        Some((short, _)) if !short.is_empty() => format!("{name} {short}"),
        _ => name.to_owned(),
    }
}

fn hosts(name: &str, addresses: &[IpAddr], others: &[(String, IpAddr)]) -> String {
    let names = own_names(name);
    let mut text = HOSTS.to_owned();
    for (name, address) in others {
        let _ = writeln!(text, "{address}\t{name}");
    }
    for address in addresses {
        let _ = writeln!(text, "{address}\t{names}");
    }
    if addresses.is_empty() {
        let _ = writeln!(text, "{OWN_LOOPBACK}\t{names}");
    }
    text
}

fn resolvers(net: &Net) -> String {
    let mut text = String::new();
    for server in &net.dns {
        let _ = writeln!(text, "nameserver {server}");
    }
    for (word, values) in [("search", &net.search), ("options", &net.options)] {
        if !values.is_empty() {
            let _ = writeln!(text, "{word} {}", values.join(" "));
        }
    }
    text
}

/// Takes the place of what the image has there, be it a link to nowhere, or a directory that
/// someone's `docker cp` or mount has left.
fn write(path: &str, text: &str) -> Result<(), String> {
    let written = make_directory(Path::new("/etc")).and_then(|()| {
        if fs::remove_file(path).is_err() {
            let _ = fs::remove_dir(path);
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(path)?;
        file.write_all(text.as_bytes())
    });
    written.map_err(|error: io::Error| format!("{path}: {}", plain(&error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_knows_itself() {
        let own = |name: &str, addresses: &[&str]| {
            let addresses = addresses.iter().map(|it| it.parse().unwrap());
            let others = [("db".to_owned(), [10, 0, 0, 1].into())];
            let text = hosts(name, &addresses.collect::<Vec<_>>(), &others);
            let own = text.strip_prefix(HOSTS).unwrap();
            own.strip_prefix("10.0.0.1\tdb\n").unwrap().to_owned()
        };
        assert_eq!(own("web", &[]), "127.0.1.1\tweb\n");
        assert_eq!(
            own("web.example.org", &["10.0.2.15", "fd00::1"]),
            "10.0.2.15\tweb.example.org web\nfd00::1\tweb.example.org web\n"
        );
    }

    #[test]
    fn a_machine_with_another_name_knows_itself() {
        let others = [("web2".to_owned(), [10, 0, 0, 1].into())];
        let own = ["10.0.2.15".parse().unwrap(), "fd00::1".parse().unwrap()];
        for (old, new) in [("web", "db.example.org"), ("web.a.example", "web2")] {
            let before = hosts(old, &own, &others);
            assert_eq!(renamed(&before, old, new), hosts(new, &own, &others));
        }
        let unknown = "10.0.0.1\tweb2\n";
        assert_eq!(renamed(unknown, "web", "db"), unknown);
        assert_eq!(renamed(unknown, "", "db"), unknown);
    }

    #[test]
    fn names_are_looked_up_as_on_the_host() {
        let net = Net {
            dns: vec!["10.0.2.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            search: vec!["a.example".into(), "b.example".into()],
            options: vec!["ndots:5".into()],
            ..Net::default()
        };
        assert_eq!(
            resolvers(&net),
            "nameserver 10.0.2.2\nnameserver fd00::2\nsearch a.example b.example\n\
             options ndots:5\n"
        );
        assert_eq!(resolvers(&Net::default()), "");
    }
}
