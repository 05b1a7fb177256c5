//! `--vsock`

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use mayfly_devices::virtio::vsock::CIDS;

use super::keys::{FromKeys, Keys};
use crate::unix_socket::OWN_NAME_MAX;

const SYNTAX: &str = "cid=N,unix=S";
/// A port's name is this much longer than the socket's: `_4294967295`.
const PORT_LEN: usize = 11;

/// Sockets between guest and host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's context identifier.
    pub cid: u32,
    /// The socket that clients of the guest connect to. A port of the host has
    /// the same name with `_` and its number.
    pub path: PathBuf,
}

impl VsockConfig {
    /// What the user wrote, for messages.
    pub fn flag(&self) -> String {
        format!("--vsock cid={},unix={}", self.cid, self.path.display())
    }
}

impl FromStr for VsockConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_text(text.as_ref())
    }
}

impl FromKeys for VsockConfig {
    const SYNTAX: &'static str = SYNTAX;

    fn from_keys(mut keys: Keys) -> Result<Self, String> {
        let (cid, path) = (keys.required("cid")?, keys.required_path("unix")?);
        keys.finish()?;
        let plain = cid.bytes().all(|byte| byte.is_ascii_digit());
        let number = cid.parse().ok().filter(|number| CIDS.contains(number));
        let (true, Some(number)) = (plain, number) else {
            return Err(format!(
                "cid {cid} is not a number from {} to {}",
                CIDS.start,
                CIDS.end - 1
            ));
        };
        const MAX: usize = OWN_NAME_MAX - PORT_LEN;
        let name = path.file_name().unwrap_or_default();
        if name.as_bytes().len() > MAX {
            return Err(format!(
                "unix is too long; a socket's name, without its folder, has at most {MAX} bytes here"
            ));
        }
        Ok(VsockConfig { cid: number, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets() {
        let deep = format!("/{}/", "d".repeat(200));
        let name = "x".repeat(OWN_NAME_MAX - PORT_LEN);
        let long = format!("cid=4294967294,unix={deep}{name}");
        let vsock: VsockConfig = long.parse().unwrap();
        assert_eq!(vsock.cid, 4_294_967_294);
        assert_eq!(vsock.flag(), format!("--vsock {long}"));
        for bad in [
            "",
            "cid=3",
            "unix=a",
            "cid=3,unix=",
            "cid=2,unix=a",
            "cid=+3,unix=a",
            "cid=-1,unix=a",
            "cid=0x10,unix=a",
            "cid=4294967295,unix=a",
            "cid=4294967296,unix=a",
            "cid=3,cid=4,unix=a",
            "cid=3,unix=a,port=1",
            &format!("{long}x"),
        ] {
            assert!(bad.parse::<VsockConfig>().is_err(), "{bad}");
        }
    }
}
