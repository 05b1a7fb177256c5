//! Disks whose content appears when a machine is restored.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// What Linux knows of block devices (Linux, `Documentation/ABI/stable/sysfs-block`).
const DISKS: &str = "/sys/block";
/// The names of virtio's disks begin so.
const VIRTIO: &str = "vd";
/// The size of a disk that is still to come, in sectors of 512 bytes: no file system is so
/// small. The host makes them so (`mayfly`'s `src/run/template.rs`).
const TO_COME: &str = "1";
/// The driver takes a disk's new size when the host has interrupted it, which is at once.
const TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_micros(50);

/// Waits until the driver knows the sizes that disks have from now on. What does not come is
/// missed by who mounts it.
pub fn wait_for_all() {
    let deadline = Instant::now() + TIMEOUT;
    while to_come(Path::new(DISKS)) && Instant::now() < deadline {
        thread::sleep(PAUSE);
    }
}

/// Whether a disk is still to come.
fn to_come(disks: &Path) -> bool {
    let Ok(entries) = fs::read_dir(disks) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let size = || fs::read_to_string(entry.path().join("size"));
        let is_virtio = entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(VIRTIO.as_bytes());
        is_virtio && size().is_ok_and(|size| size.trim() == TO_COME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_of_one_sector_is_still_to_come() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, size: &str| {
            let disk = folder.path().join(name);
            fs::create_dir_all(&disk).unwrap();
            fs::write(disk.join("size"), size).unwrap();
        };
        assert!(!to_come(&folder.path().join("none")));
        put("loop0", "1\n");
        put("vda", "16\n");
        assert!(!to_come(folder.path()));
        put("vdb", "1\n");
        assert!(to_come(folder.path()));
        put("vdb", "2\n");
        assert!(!to_come(folder.path()));
    }
}
