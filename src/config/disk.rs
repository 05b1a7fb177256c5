//! `--disk`

use std::path::PathBuf;
use std::str::FromStr;

use super::keys::Keys;

/// A disk's id is at most this long (virtio 1.2, 5.2.6, `VIRTIO_BLK_ID_BYTES`).
const DISK_ID_MAX: usize = 20;
const SYNTAX: &str = "path=F[,ro][,id=S]";

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest sees as the serial number.
    pub id: Option<String>,
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut keys = Keys::parse(text, SYNTAX);
        let disk = DiskConfig {
            path: keys.required("path")?.into(),
            read_only: keys.flag("ro")?,
            id: keys.value("id")?,
        };
        keys.finish()?;
        if let Some(id) = &disk.id
            && (id.len() > DISK_ID_MAX || !id.is_ascii())
        {
            return Err(format!("id must have 1 to {DISK_ID_MAX} ASCII characters"));
        }
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let disk: DiskConfig = "path=a=b,,c.img,ro,id=root".parse().unwrap();
        assert_eq!(disk.path, PathBuf::from("a=b,c.img"));
        assert!(disk.read_only);
        assert_eq!(disk.id.as_deref(), Some("root"));
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
        ] {
            assert!(bad.parse::<DiskConfig>().is_err(), "{bad}");
        }
    }
}
