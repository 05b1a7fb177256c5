//! `--ulimit`: what a process in a VM may have, as `setrlimit(2)` counts it.

use std::str::FromStr;

use mayfly_protocol::agent::Limit;

/// Linux' names and numbers (`asm-generic/resource.h`).
const NAMES: [(&str, u8); 16] = [
    ("cpu", 0),
    ("fsize", 1),
    ("data", 2),
    ("stack", 3),
    ("core", 4),
    ("rss", 5),
    ("nproc", 6),
    ("nofile", 7),
    ("memlock", 8),
    ("as", 9),
    ("locks", 10),
    ("sigpending", 11),
    ("msgqueue", 12),
    ("nice", 13),
    ("rtprio", 14),
    ("rttime", 15),
];
const NOFILE: u8 = 7;
/// No process of a guest can have more files open (`/proc/sys/fs/nr_open`).
const NOFILE_MAX: u64 = 1 << 20;

/// Reads `NAME=SOFT[:HARD]`; -1 is no limit.
pub fn parse(text: &str) -> Result<Limit, String> {
    let wrong = || {
        let names: Vec<_> = NAMES.iter().map(|(name, _)| *name).collect();
        format!("write NAME=SOFT[:HARD], with one of {}", names.join(", "))
    };
    let (name, values) = text.split_once('=').ok_or_else(wrong)?;
    let resource = NAMES.iter().find(|(known, _)| *known == name);
    let &(_, resource) = resource.ok_or_else(wrong)?;
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let number = |text: &str| match text {
        "-1" | "unlimited" => Some(u64::MAX),
        text => u64::from_str(text).ok(),
    };
    let (soft, hard) = number(soft).zip(number(hard)).ok_or_else(wrong)?;
    if soft > hard {
        return Err("the soft limit is above the hard one".into());
    }
    if resource == NOFILE && hard > NOFILE_MAX {
        return Err(format!("Linux gives a process at most {NOFILE_MAX} files"));
    }
    Ok(Limit {
        resource,
        soft,
        hard,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_docker_s() {
        for (text, resource, soft, hard) in [
            ("nofile=64", 7, 64, 64),
            ("nofile=64:128", 7, 64, 128),
            ("core=-1", 4, u64::MAX, u64::MAX),
            ("memlock=0:unlimited", 8, 0, u64::MAX),
        ] {
            let limit = Limit {
                resource,
                soft,
                hard,
            };
            assert_eq!(parse(text).unwrap(), limit, "{text}");
        }
        for text in [
            "",
            "nofile",
            "nofile=",
            "nofile=x",
            "nofile=2:1",
            "nofile=-1",
            "nofile=-2",
            "x=1",
            "nofile=1:2:3",
            "NOFILE=1",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
