//! `--disk`

use std::path::PathBuf;
use std::str::FromStr;

use mayfly_devices::rate_limiter::Limits;

use super::keys::{FromKeys, Keys};
use super::limits::take_limits;
use super::queues::Queues;
use crate::spec::BlockSpec;

/// A disk's id is at most this long (virtio 1.2, 5.2.6, `VIRTIO_BLK_ID_BYTES`).
const DISK_ID_MAX: usize = 20;
const SYNTAX: &str = "path=F[,ro][,id=S][,format=raw|qcow2][,backing=F][,backing-format=raw|qcow2]\
                      [,bw=10M][,bw-burst=50M][,iops=500][,iops-burst=1000][,queues=N|cpus]";

/// How an image is laid out. It is said by the user, never guessed: a guest
/// that writes a header to its raw disk must not turn it into something else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes.
    #[default]
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(format!("{text} is not a format; write raw or qcow2")),
        }
    }
}

/// The image that another one is the difference to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingConfig {
    /// The file, which is only read.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// An image or a block device.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// What a qcow2 image is the difference to.
    pub backing: Option<BackingConfig>,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest sees as the serial number.
    pub id: Option<String>,
    /// How much the guest may move.
    pub limits: Limits,
    /// How many queues it has.
    pub queues: Queues,
    /// What asked for it, if that was not `--disk`.
    pub origin: Option<String>,
    /// What the device is called, if not by its number.
    pub name: Option<String>,
}

impl DiskConfig {
    /// The disk of a volume of `mayfly run`, which a flag asked for, and its device's name.
    pub fn of_volume(path: PathBuf, read_only: bool, flag: String, name: &str) -> Self {
        DiskConfig {
            path,
            format: Format::Raw,
            backing: None,
            read_only,
            id: None,
            limits: Limits::default(),
            queues: Queues::Number(1),
            origin: Some(flag),
            name: Some(name.to_owned()),
        }
    }

    /// What the guest of a VM with `cpus` vCPUs sees of it.
    pub(super) fn spec(&self, cpus: u8) -> BlockSpec {
        BlockSpec {
            read_only: self.read_only,
            id: self.id.clone().unwrap_or_default(),
            queues: self.queues.number(cpus),
            limits: self.limits,
        }
    }

    /// The same of what its image is the difference to.
    pub fn backing_flag(&self) -> String {
        match &self.backing {
            Some(backing) => format!("{}: backing={}", self.flag(), backing.path.display()),
            None => self.flag(),
        }
    }

    /// What asked for it, for messages.
    pub fn flag(&self) -> String {
        let own = || format!("--disk path={}", self.path.display());
        self.origin.clone().unwrap_or_else(own)
    }
}

impl FromKeys for DiskConfig {
    const SYNTAX: &'static str = SYNTAX;

    fn from_keys(mut keys: Keys) -> Result<Self, String> {
        let disk = DiskConfig {
            path: keys.required_path("path")?,
            format: take_format(&mut keys, "format")?.unwrap_or_default(),
            backing: take_backing(&mut keys)?,
            read_only: keys.flag("ro")?,
            id: keys.value("id")?,
            limits: take_limits(&mut keys, "iops")?,
            queues: Queues::take(&mut keys)?,
            origin: None,
            name: None,
        };
        keys.finish()?;
        if disk.backing.is_some() && disk.format != Format::Qcow2 {
            return Err("backing= needs format=qcow2; a raw image is whole".into());
        }
        if let Some(id) = &disk.id
            && (id.len() > DISK_ID_MAX || !id.is_ascii())
        {
            return Err(format!("id must have 1 to {DISK_ID_MAX} ASCII characters"));
        }
        Ok(disk)
    }
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_text(text.as_ref())
    }
}

fn take_format(keys: &mut Keys, key: &str) -> Result<Option<Format>, String> {
    let value = keys.value(key)?;
    let format = value.as_deref().map(str::parse).transpose();
    format.map_err(|error| format!("{key}={error}"))
}

fn take_backing(keys: &mut Keys) -> Result<Option<BackingConfig>, String> {
    let format = take_format(keys, "backing-format")?;
    match (keys.path("backing")?, format) {
        (Some(path), format) => Ok(Some(BackingConfig {
            path,
            format: format.unwrap_or_default(),
        })),
        (None, Some(_)) => Err("backing-format needs backing=".into()),
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn disks() {
        let disk: DiskConfig = "path=a=b,,c.img,ro,id=root".parse().unwrap();
        assert_eq!(disk.path, PathBuf::from("a=b,c.img"));
        assert!(disk.read_only);
        assert_eq!(disk.id.as_deref(), Some("root"));
        assert_eq!((disk.format, disk.backing), (Format::Raw, None));
        assert_eq!(disk.queues, Queues::Number(1));
        assert_eq!(disk.limits, Limits::default());
        let disk: DiskConfig = "path=a,format=qcow2,backing=b,backing-format=qcow2,queues=cpus"
            .parse()
            .unwrap();
        let backing = BackingConfig {
            path: "b".into(),
            format: Format::Qcow2,
        };
        assert_eq!((disk.format, disk.backing), (Format::Qcow2, Some(backing)));
        assert_eq!(disk.queues.number(3), 3);
        let bytes = b"path=gr\xfcn,,b=c.img,ro,format=qcow2,backing=\xfc";
        let disk = DiskConfig::from_text(OsStr::from_bytes(bytes)).unwrap();
        assert_eq!(disk.path.as_os_str().as_bytes(), b"gr\xfcn,b=c.img");
        let backing = disk.backing.unwrap();
        assert_eq!(backing.path.as_os_str().as_bytes(), b"\xfc");
        let refused = DiskConfig::from_text(OsStr::from_bytes(b"path=a,id=\xfc"));
        assert_eq!(refused.unwrap_err(), "id= is not UTF-8");
        for bad in [
            "",
            "a.img",
            "path=",
            "path",
            "ro",
            "path=a,ro=1",
            "path=a,path=b",
            "path=a,rw",
            "path=a,",
            "path=a,id=",
            "path=a,id=123456789012345678901",
            "path=a,format=vmdk",
            "path=a,format=",
            "path=a,backing=b",
            "path=a,format=raw,backing=b",
            "path=a,format=qcow2,backing-format=raw",
            "path=a,format=qcow2,backing=b,backing-format=auto",
            "path=a,queues=0",
            "path=a,queues=256",
            "path=a,queues=all",
            "path=a,bw=0",
            "path=a,pps=1",
        ] {
            assert!(bad.parse::<DiskConfig>().is_err(), "{bad}");
        }
    }
}
