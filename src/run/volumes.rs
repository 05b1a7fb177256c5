//! The volumes of a VM of `mayfly run`: folders of the host, disks, named volumes.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use mayfly_guest::protocol::{Mount, Source};

use crate::config::{FolderConfig, escape};
use crate::failure::{Failure, OrFail};
use crate::machine::refusal;
use crate::volume::{Volumes as Named, is_ext4};

const SYNTAX: &str = "write FOLDER:DIR[:ro], with the name of a volume or the path of a disk in \
                      place of FOLDER, or DIR alone";
const TARGET: &str = "the guest's folder must begin with a slash, be below /, and have no ..";

/// What the machine has for them, and what its guest mounts.
#[derive(Debug, Default)]
pub struct Volumes {
    /// Folders, which need shared memory.
    pub folders: Vec<FolderConfig>,
    /// Disks, as `--disk` has them.
    pub disks: Vec<String>,
    /// The host's folders with what the guest may write to.
    pub written: Vec<PathBuf>,
    /// What goes where.
    pub mounts: Vec<Mount>,
}

/// What a user wrote.
#[derive(Debug, PartialEq, Eq)]
struct Wish<'a> {
    /// None is the VM's own, which ends with it.
    source: Option<&'a str>,
    target: &'a str,
    read_only: bool,
}

/// What that is on this host.
enum Found {
    Folder(PathBuf),
    Disk(PathBuf),
    Named(String),
    Own,
}

impl Volumes {
    /// Finds what the user wants, whose disks come behind so many others. Named ones
    /// are made if they are missing, once all the rest is found.
    pub fn find(texts: &[String], disks_before: usize) -> Result<Self, Failure> {
        let mut all = Vec::new();
        for text in texts {
            let flag = format!("-v {text}");
            let wish = parse(text).map_err(|why| Failure::config(format!("{flag}: {why}")))?;
            let found = match wish.source {
                Some(source) => look(source, &flag)?,
                None => Found::Own,
            };
            all.push((flag, wish, found));
        }
        for (index, (flag, wish, _)) in all.iter().enumerate() {
            let same = |(_, other, _): &&(_, Wish, _)| other.target == wish.target;
            if all[..index].iter().any(|other| same(&other)) {
                return Err(Failure::config(format!(
                    "{flag}: another volume goes to {}, too",
                    wish.target
                )));
            }
        }
        let mut volumes = Volumes::default();
        for (flag, wish, found) in all {
            let source = match found {
                Found::Folder(path) => volumes.add_folder(path, wish.read_only, flag),
                Found::Disk(path) => {
                    volumes.add_disk(&path, wish.read_only, disks_before, &flag)?
                }
                Found::Named(name) => {
                    let path = Named::open_default()?.take(&name)?;
                    let disk = volumes.add_disk(&path, wish.read_only, disks_before, &flag)?;
                    match disk {
                        Source::Disk(disk) if !wish.read_only => Source::Volume(disk),
                        disk => disk,
                    }
                }
                Found::Own => Source::Own,
            };
            volumes.mounts.push(Mount {
                target: wish.target.into(),
                source,
                read_only: wish.read_only,
            });
        }
        Ok(volumes)
    }

    fn add_folder(&mut self, path: PathBuf, read_only: bool, flag: String) -> Source {
        let tag = format!("v{}", self.folders.len());
        if !read_only {
            self.written.push(path.clone());
        }
        self.folders.push(FolderConfig {
            path,
            tag: tag.clone(),
            read_only,
            flag,
        });
        Source::Folder(tag)
    }

    fn add_disk(
        &mut self,
        path: &Path,
        read_only: bool,
        before: usize,
        flag: &str,
    ) -> Result<Source, Failure> {
        let letter = u8::try_from(before + self.disks.len()).ok();
        let letter = letter.and_then(|index| b'a'.checked_add(index));
        let letter = letter.filter(u8::is_ascii_lowercase);
        let letter = letter.ok_or_else(|| Failure::config(format!("{flag}: too many disks")))?;
        if let (false, Some(folder)) = (read_only, path.parent()) {
            self.written.push(folder.to_owned());
        }
        let mode = if read_only { ",ro" } else { "" };
        let path = escape(&path.to_string_lossy());
        self.disks.push(format!("path={path}{mode}"));
        Ok(Source::Disk(format!("/dev/vd{}", char::from(letter))))
    }
}

fn parse(text: &str) -> Result<Wish<'_>, String> {
    if text.starts_with('/') && !text.contains(':') {
        return Ok(Wish {
            source: None,
            target: target(text)?,
            read_only: false,
        });
    }
    let mut parts = text.split(':');
    let (Some(source), Some(folder), options, None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(SYNTAX.into());
    };
    let mut read_only = false;
    for option in options.into_iter().flat_map(|options| options.split(',')) {
        match option {
            "ro" => read_only = true,
            "rw" => read_only = false,
            _ => return Err(format!("{option}: write ro, or rw")),
        }
    }
    if source.is_empty() {
        return Err(SYNTAX.into());
    }
    Ok(Wish {
        source: Some(source),
        target: target(folder)?,
        read_only,
    })
}

/// A folder of the guest's.
fn target(text: &str) -> Result<&str, String> {
    let target = text.strip_suffix('/').unwrap_or(text);
    let mut parts = target.split('/');
    let bad = |part| [".", ".."].contains(&part);
    match !target.starts_with('/') || parts.any(bad) || text.contains('\0') {
        true => Err(TARGET.into()),
        false => Ok(target),
    }
}

/// The volumes that an image names, but for those that the user has others for.
pub fn of_image(texts: &[String], others: &[Mount]) -> Result<Vec<Mount>, Failure> {
    let mut all = Vec::new();
    for text in texts {
        let failed = |why| Failure::config(format!("the image's VOLUME {text}: {why}"));
        let target = target(text).map_err(failed)?.as_bytes().to_vec();
        let same =
            |other: &Mount| other.target.strip_suffix(b"/").unwrap_or(&other.target) == target;
        if !others.iter().chain(&all).any(same) {
            all.push(Mount {
                target,
                source: Source::Own,
                read_only: false,
            });
        }
    }
    Ok(all)
}

/// A path begins as one; all else is a name, as Docker has it.
fn look(source: &str, flag: &str) -> Result<Found, Failure> {
    if !source.starts_with(['/', '.']) {
        return match crate::control::valid_name(source) {
            true => Ok(Found::Named(source.to_owned())),
            false => Err(Failure::config(format!(
                "{flag}: {source} is no name of a volume; a path begins with / or ./"
            ))),
        };
    }
    let path = Path::new(source);
    let metadata = path.metadata().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Failure::config(format!(
            "{flag}: there is no {source}; make the folder first: mkdir -p {source}"
        )),
        _ => refusal(&error, flag),
    })?;
    let path = path.canonicalize().map_err(|error| refusal(&error, flag))?;
    if metadata.is_dir() {
        return Ok(Found::Folder(path));
    }
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(Failure::config(format!(
            "{flag}: is neither a folder nor a disk"
        )));
    }
    match is_ext4(&path).or_host(flag)? {
        true => Ok(Found::Disk(path)),
        false => Err(Failure::config(format!(
            "{flag}: has no ext4 file system; a file is mounted as a disk. To share what is in it, \
             share its folder"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes() {
        for (text, target, read_only) in [
            ("/b", "/b", false),
            ("/b/", "/b", false),
            ("a:/b", "/b", false),
            ("./a:/b/:ro", "/b", true),
            ("/a:/b/c:rw", "/b/c", false),
        ] {
            let wish = parse(text).unwrap();
            assert_eq!((wish.target, wish.read_only), (target, read_only), "{text}");
        }
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
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_image_s_volumes_make_way_for_the_user_s() {
        let other = |target: &str| Mount {
            target: target.into(),
            source: Source::Folder("v0".into()),
            read_only: true,
        };
        let texts = ["/a", "/b/", "/c", "/c/"].map(str::to_owned);
        let volumes = of_image(&texts, &[other("/b"), other("/c/d")]).unwrap();
        let targets: Vec<_> = volumes.iter().map(|it| it.target.as_slice()).collect();
        assert_eq!(targets, [b"/a", b"/c"]);
        assert_eq!(
            of_image(&texts, &[other("/a/"), other("/b"), other("/c")]).unwrap(),
            []
        );
        for text in ["data", "/", "/a/../b"] {
            assert!(of_image(&[text.to_owned()], &[]).is_err(), "{text}");
        }
    }

    #[test]
    fn what_a_source_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap().to_owned();
        std::fs::write(folder.path().join("file"), "x").unwrap();
        let disk = folder.path().join("a,disk");
        let made = crate::volume::make_ext4(&disk, 8 << 20, crate::volume::Journal::No, "");
        made.unwrap();
        let texts = [
            format!("{path}:/x:ro"),
            format!("{path}/a,disk:/y"),
            format!("{path}/.:/z"),
        ];
        let volumes = Volumes::find(&texts, 2).unwrap();
        assert_eq!(volumes.folders.len(), 2);
        assert!(volumes.folders[0].read_only && !volumes.folders[1].read_only);
        assert_eq!(volumes.folders[0].path, volumes.folders[1].path);
        assert_eq!(volumes.disks, [format!("path={path}/a,,disk")]);
        let sources: Vec<_> = volumes.mounts.iter().map(|it| it.source.clone()).collect();
        let expected = [
            Source::Folder("v0".into()),
            Source::Disk("/dev/vdc".into()),
            Source::Folder("v1".into()),
        ];
        assert_eq!(sources, expected);
        assert!(volumes.mounts[0].read_only);
        assert_eq!(volumes.written.len(), 2);

        for (text, reason) in [
            (format!("{path}/none:/x"), "mkdir -p"),
            (format!("{path}/file:/x"), "share its folder"),
            (format!("{path}/file/x:/x"), "no folder"),
            ("/dev/null:/x".into(), "neither"),
            ("a/b:/x".into(), "begins with / or ./"),
            ("-a:/x".into(), "begins with / or ./"),
        ] {
            let refused = Volumes::find(&[text], 1).unwrap_err().to_string();
            assert!(refused.contains(reason), "{refused}");
        }
        let twice = [format!("{path}:/x"), format!("{path}:/x/")];
        let refused = Volumes::find(&twice, 1).unwrap_err().to_string();
        assert!(refused.contains("another volume"), "{refused}");
        assert!(Volumes::find(&texts, 26).is_err());
    }
}
