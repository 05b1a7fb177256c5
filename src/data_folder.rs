//! Where a user's images, volumes and logs are.

use std::env;
use std::path::PathBuf;

use crate::failure::Failure;

/// What the user keeps: `mayfly` in `XDG_DATA_HOME`, or in `~/.local/share`.
pub fn data_folder() -> Result<PathBuf, Failure> {
    let variable = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let data = variable("XDG_DATA_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".local/share")))
        .ok_or_else(|| Failure::host("mayfly's data: set HOME or XDG_DATA_HOME"))?;
    Ok(data.join("mayfly"))
}
