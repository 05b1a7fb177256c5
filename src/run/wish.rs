//! What a user wants mounted: `-v SOURCE:DIR[:OPTIONS]`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

const SYNTAX: &str = "write FOLDER:DIR[:ro], with the name of a volume or the path of a disk in \
                      place of FOLDER, or DIR alone";
const TARGET: &str = "the guest's folder must begin with a slash, be below /, and have no ..";
/// What other engines share folders by, where they need it. It means nothing here.
const MEANINGLESS: [&str; 13] = [
    "z",
    "Z",
    "cached",
    "delegated",
    "consistent",
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "bind",
    "rbind",
];

/// What a user wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// What of the host's.
    pub source: Wanted,
    /// Where in the guest.
    pub target: Vec<u8>,
    /// The guest may not write there.
    pub read_only: bool,
    /// A named volume that is empty is left so.
    pub no_copy: bool,
}

/// What of the host's a volume is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A folder, or a disk's image.
    Path(PathBuf),
    /// A volume of that name.
    Named(String),
    /// The VM's own, which ends with it.
    Own,
}

/// Reads the value of `-v`.
pub fn parse(text: &OsStr) -> Result<Wish, String> {
    let bytes = text.as_bytes();
    let wish = |source, folder, read_only, no_copy| {
        Ok(Wish {
            source,
            target: target(folder)?,
            read_only,
            no_copy,
        })
    };
    if bytes.starts_with(b"/") && !bytes.contains(&b':') {
        return wish(Wanted::Own, bytes, false, false);
    }
    let mut parts = bytes.split(|&byte| byte == b':');
    let (Some(source), Some(folder), options, None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(SYNTAX.into());
    };
    let (mut read_only, mut no_copy) = (false, false);
    for option in options
        .into_iter()
        .flat_map(|options| options.split(|&byte| byte == b','))
    {
        match std::str::from_utf8(option) {
            Ok("ro" | "readonly") => read_only = true,
            Ok("rw") => read_only = false,
            Ok("nocopy") => no_copy = true,
            Ok(option) if MEANINGLESS.contains(&option) => {}
            _ => {
                let option = OsStr::from_bytes(option);
                return Err(format!("{:?}: write ro, or rw", option));
            }
        }
    }
    wish(
        wanted(OsStr::from_bytes(source))?,
        folder,
        read_only,
        no_copy,
    )
}

/// A path begins as one; all else is a name, as Docker has it.
fn wanted(source: &OsStr) -> Result<Wanted, String> {
    match source.as_bytes() {
        [] => Err(SYNTAX.into()),
        [b'/' | b'.', ..] => Ok(Wanted::Path(source.into())),
        _ => volume_name(source).map(Wanted::Named),
    }
}

/// The name of a volume.
pub fn volume_name(text: &OsStr) -> Result<String, String> {
    match text
        .to_str()
        .filter(|name| crate::control::valid_name(name))
    {
        Some(name) => Ok(name.to_owned()),
        None => Err(format!(
            "{} is no name of a volume; a path begins with / or ./",
            text.display()
        )),
    }
}

/// A folder of the guest's.
pub fn target(text: &[u8]) -> Result<Vec<u8>, String> {
    let parts = text.split(|&byte| byte == b'/');
    let mut target = Vec::new();
    for part in parts.filter(|part| !part.is_empty()) {
        if [&b"."[..], b".."].contains(&part) {
            return Err(TARGET.into());
        }
        target.push(b'/');
        target.extend_from_slice(part);
    }
    match !text.starts_with(b"/") || target.is_empty() || text.contains(&0) {
        true => Err(TARGET.into()),
        false => Ok(target),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes() {
        for (text, target, read_only) in [
            (&b"/b"[..], &b"/b"[..], false),
            (b"/b/", b"/b", false),
            (b"a://b///c/", b"/b/c", false),
            (b"a:/b", b"/b", false),
            (b"./a:/b/:ro", b"/b", true),
            (b"/a:/b/c:rw", b"/b/c", false),
            // What is for SELinux, macOS, or mounts of containers.
            (b"a:/b:z", b"/b", false),
            (b"a:/b:Z,ro", b"/b", true),
            (b"a:/b:rw,cached", b"/b", false),
            (b"a:/b:ro,delegated", b"/b", true),
            (b"/a:/b:consistent,rslave", b"/b", false),
            (b"/gr\xfcn:/\xfc:ro", b"/\xfc", true),
        ] {
            let wish = parse(OsStr::from_bytes(text)).unwrap();
            assert_eq!(
                (&*wish.target, wish.read_only),
                (target, read_only),
                "{text:?}"
            );
        }
        let path = parse(OsStr::from_bytes(b"/gr\xfcn:/b")).unwrap().source;
        assert_eq!(path, Wanted::Path(OsStr::from_bytes(b"/gr\xfcn").into()));
        assert!(parse("a:/b:nocopy".as_ref()).unwrap().no_copy);
        for text in [
            "",
            "a",
            "/",
            "/a/..",
            "a:b",
            ":/b",
            "a:",
            "a:/",
            "a:/b:x",
            "a:/b:",
            "a:/b:ro:x",
            "a:/b/../c",
            "a/b:/x",
            "-a:/x",
        ] {
            assert!(parse(text.as_ref()).is_err(), "{text}");
        }
    }
}
