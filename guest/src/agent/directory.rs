//! Directories of the image that the machine needs, and that may be missing.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

const MODE: u32 = 0o755;

/// Makes a directory and its parents. Where a link on the way points to nothing, what it
/// points to is made, as in Docker.
pub fn make_directory(path: &Path) -> io::Result<()> {
    const LINKS_MAX: u32 = 8;
    make_behind_links(path, LINKS_MAX)
}

fn make_behind_links(path: &Path, links: u32) -> io::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(MODE).create(path);
    let leads_nowhere = |path: &&Path| path.is_symlink() && !path.exists();
    let Err(error) = made else { return Ok(()) };
    let link = path.ancestors().find(leads_nowhere);
    let (Some(link), Some(links)) = (link, links.checked_sub(1)) else {
        return Err(error);
    };
    let parent = link.parent().unwrap_or(Path::new("/"));
    make_behind_links(&parent.join(fs::read_link(link)?), links)?;
    make_behind_links(path, links)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn directories_are_made_behind_links_that_lead_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        symlink("b/c", path("a")).unwrap();
        symlink(path("d"), path("b")).unwrap();
        make_directory(&path("a/x")).unwrap();
        assert!(path("d/c/x").is_dir());
        make_directory(&path("a/x")).unwrap();
        symlink("loop", path("loop")).unwrap();
        fs::write(path("file"), "").unwrap();
        for bad in ["loop", "loop/x", "file", "file/x"] {
            assert!(make_directory(&path(bad)).is_err(), "{bad}");
        }
    }
}
