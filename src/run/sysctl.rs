//! `--sysctl NAME=VALUE`: settings of the guest's kernel.

use mayfly_protocol::agent::Sysctl;

use crate::failure::Failure;

/// Reads a setting. As in `sysctl(8)`, the first dot or slash in a name says which of them
/// separates its parts; the other one is part of a part.
pub fn parse(text: &str) -> Result<Sysctl, Failure> {
    let wrong = || {
        Failure::config(format!(
            "--sysctl {}: write NAME=VALUE, such as vm.max_map_count=1048576",
            text.escape_debug()
        ))
    };
    let (name, value) = text.split_once('=').ok_or_else(wrong)?;
    let swapped = |byte: char| match byte {
        '.' => '/',
        '/' => '.',
        byte => byte,
    };
    let path: String = match name.find(['.', '/']) {
        Some(at) if name[at..].starts_with('.') => name.chars().map(swapped).collect(),
        _ => name.to_owned(),
    };
    let part = |part: &str| !part.is_empty() && ![".", ".."].contains(&part);
    if !path.split('/').all(part) || text.contains(['\0', '\n']) {
        return Err(wrong());
    }
    Ok(Sysctl {
        name: name.to_owned(),
        path,
        value: value.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_paths() {
        for (text, path, value) in [
            ("vm.swappiness=0", "vm/swappiness", "0"),
            ("vm/swappiness=", "vm/swappiness", ""),
            ("net.ipv4.conf.a/b.x=1", "net/ipv4/conf/a.b/x", "1"),
            ("net/ipv4/conf/a.b/x=1", "net/ipv4/conf/a.b/x", "1"),
            ("kernel.sem=250 32000=x", "kernel/sem", "250 32000=x"),
        ] {
            let sysctl = parse(text).unwrap();
            assert_eq!(sysctl.path, path, "{text}");
            assert_eq!(sysctl.value, value.as_bytes(), "{text}");
        }
        for wrong in [
            "", "vm.x", "=1", "a..b=1", ".a=1", "a.=1", "/a=1", "../x=1", "a/../x=1", "a.b=\0",
            "a.b=1\nx", "a/./b=1",
        ] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.starts_with("--sysctl "), "{wrong:?}: {error}");
        }
    }
}
