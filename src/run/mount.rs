//! `--mount`: volumes and memory in Docker's longer words.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use mayfly_protocol::agent::Mount;

use super::tmpfs;
use super::wish::{Wanted, Wish, target, volume_name};

const SYNTAX: &str = "write type=bind|volume|tmpfs[,src=SRC],dst=DIR[,ro]";

/// What is mounted.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// Something of the host's, or the VM's own.
    Volume(Wish),
    /// Memory.
    Memory(Mount),
}

/// The keys, as they were given.
#[derive(Default)]
struct Fields<'a> {
    kind: &'a [u8],
    source: Option<&'a [u8]>,
    target: Option<&'a [u8]>,
    read_only: bool,
    no_copy: bool,
    memory: Vec<String>,
}

/// Reads `KEY=VALUE,…`.
pub fn parse(text: &OsStr) -> Result<Kind, String> {
    let fields = split(text.as_bytes())?;
    let to = fields
        .target
        .ok_or_else(|| format!("has no dst=; {SYNTAX}"))?;
    let volume = |source| {
        Ok(Kind::Volume(Wish {
            source,
            target: target(to)?,
            read_only: fields.read_only,
            no_copy: fields.no_copy,
        }))
    };
    if fields.kind != b"tmpfs" && !fields.memory.is_empty() {
        return Err("tmpfs-size and tmpfs-mode are for type=tmpfs".into());
    }
    match (fields.kind, fields.source) {
        (b"bind", Some(source)) => volume(Wanted::Path(PathBuf::from(OsStr::from_bytes(source)))),
        (b"bind", None) => Err("type=bind has no src=, a folder of the host's".into()),
        (b"volume", Some(name)) => volume(Wanted::Named(volume_name(OsStr::from_bytes(name))?)),
        (b"volume", None) => volume(Wanted::Own),
        (b"tmpfs", None) => {
            let mut options = fields.memory;
            options.extend(fields.read_only.then(|| "ro".to_owned()));
            tmpfs::memory(&target(to)?, &options.join(",")).map(Kind::Memory)
        }
        (b"tmpfs", Some(_)) => Err("type=tmpfs is memory, and has no src=".into()),
        (kind, _) => Err(format!(
            "there is no type={}; {SYNTAX}",
            OsStr::from_bytes(kind).display()
        )),
    }
}

fn split(text: &[u8]) -> Result<Fields<'_>, String> {
    let mut fields = Fields {
        kind: b"volume",
        ..Fields::default()
    };
    for field in text.split(|&byte| byte == b',') {
        let at = field.iter().position(|&byte| byte == b'=');
        let (key, value) = match at {
            Some(at) => (field.get(..at).unwrap_or_default(), field.get(at + 1..)),
            None => (field, None),
        };
        let shown = OsStr::from_bytes(key).display();
        let given = || match value {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(format!("{shown} has no value; {SYNTAX}")),
        };
        let flag = || match value {
            None | Some(b"true" | b"1") => Ok(true),
            Some(b"false" | b"0") => Ok(false),
            Some(_) => Err(format!("{shown} is true or false")),
        };
        match key {
            b"type" => fields.kind = given()?,
            b"src" | b"source" => fields.source = value.filter(|value| !value.is_empty()),
            b"dst" | b"destination" | b"target" => fields.target = Some(given()?),
            b"ro" | b"readonly" => fields.read_only = flag()?,
            b"volume-nocopy" => fields.no_copy = flag()?,
            b"tmpfs-size" | b"tmpfs-mode" => {
                let name = if key == b"tmpfs-size" { "size" } else { "mode" };
                let value = String::from_utf8_lossy(given()?);
                fields.memory.push(format!("{name}={value}"));
            }
            // They say how a container's mounts and the host's are seen by each other.
            b"consistency" | b"bind-propagation" | b"bind-nonrecursive" | b"bind-recursive" => {}
            b"volume-driver" if value == Some(b"local") => {}
            _ => return Err(format!("{shown} is not known; {SYNTAX}")),
        }
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::agent::Source;
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    fn volume(text: &[u8]) -> (Wanted, Vec<u8>, bool, bool) {
        match parse(&OsString::from_vec(text.to_vec())).unwrap() {
            Kind::Volume(wish) => (wish.source, wish.target, wish.read_only, wish.no_copy),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn mounts_are_docker_s() {
        let path = |path: &[u8]| Wanted::Path(OsString::from_vec(path.to_vec()).into());
        assert_eq!(
            volume(b"type=bind,src=./d\xfc,dst=/d/"),
            (path(b"./d\xfc"), b"/d".to_vec(), false, false)
        );
        assert_eq!(
            volume(b"type=bind,source=d,target=/d,readonly,bind-propagation=rslave"),
            (path(b"d"), b"/d".to_vec(), true, false)
        );
        assert_eq!(
            volume(b"src=data,destination=/d,ro=false,volume-nocopy=true"),
            (Wanted::Named("data".into()), b"/d".to_vec(), false, true)
        );
        assert_eq!(
            volume(b"type=volume,dst=/d"),
            (Wanted::Own, b"/d".to_vec(), false, false)
        );
        let memory = parse("type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=700,ro".as_ref()).unwrap();
        let expected = Mount {
            target: b"/t".to_vec(),
            source: Source::Tmpfs {
                options: "mode=1777,size=1048576,mode=700".into(),
                no_exec: false,
            },
            read_only: true,
        };
        assert_eq!(memory, Kind::Memory(expected));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "",
            "type=bind",
            "type=bind,dst=/d",
            "type=bind,src=/a,dst=d",
            "type=bind,src=/a,dst=/d/..",
            "type=bind,src=/a,dst=/d,tmpfs-size=1m",
            "type=volume,src=/a,dst=/d",
            "type=volume,src=a,dst=/d,volume-driver=nfs",
            "type=tmpfs,src=a,dst=/d",
            "type=tmpfs,dst=/d,tmpfs-size=x",
            "type=npipe,src=a,dst=/d",
            "type=bind,src=/a,dst=/d,ro=maybe",
            "type=bind,src=/a,dst=/d,",
        ] {
            assert!(parse(text.as_ref()).is_err(), "{text}");
        }
    }
}
