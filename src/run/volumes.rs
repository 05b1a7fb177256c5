//! The volumes of a VM of `mayfly run`: folders of the host, disks, named volumes.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use mayfly_protocol::agent::{Mount, Source};

use super::mount;
use super::tmpfs::tmpfs as memory_mount;
use super::wish::{Wanted, parse, target};
use crate::config::{DiskConfig, FolderConfig};
use crate::failure::file_refusal;
use crate::failure::{Failure, OrFail};
use crate::spec::MachineSpec;
use crate::volume::{Volumes as Named, is_ext4};

/// The most volumes that an image may name: each is a mount of the guest's.
const OF_IMAGE_MAX: usize = 256;
/// What the machine has for them, and what its guest mounts.
#[derive(Debug, Default)]
pub struct Volumes {
    /// Folders, which need shared memory.
    pub folders: Vec<FolderConfig>,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// The host's folders with what the guest may write to.
    pub written: Vec<PathBuf>,
    /// What goes where.
    pub mounts: Vec<Mount>,
}

/// What that is on this host.
enum Found {
    Folder(PathBuf),
    Disk(PathBuf),
    Named(String),
    Own,
}

impl Volumes {
    /// Finds what the user wants. Named volumes are made if they are missing, once all the rest
    /// is found. The sources of mounts are the names of disks, until [`Volumes::locate`].
    pub fn find(
        texts: &[OsString],
        mounts: &[OsString],
        tmpfs: &[OsString],
    ) -> Result<Self, Failure> {
        let mut volumes = Volumes::default();
        let mut wishes = Vec::new();
        // What is where another volume is would hide it. Of --tmpfs, the last one counts.
        let mut taken = HashSet::new();
        for text in tmpfs {
            taken.insert(memory_mount(text)?.target);
        }
        let mut take = |flag: &str, target: &[u8]| match taken.insert(target.to_owned()) {
            true => Ok(()),
            false => Err(Failure::config(format!(
                "{flag}: another volume goes to {}, too",
                OsStr::from_bytes(target).display()
            ))),
        };
        for text in texts {
            let flag = format!("-v {}", text.display());
            let wish = parse(text).map_err(|why| Failure::config(format!("{flag}: {why}")))?;
            take(&flag, &wish.target)?;
            wishes.push((flag, wish));
        }
        for text in mounts {
            let flag = format!("--mount {}", text.display());
            match mount::parse(text).map_err(|why| Failure::config(format!("{flag}: {why}")))? {
                mount::Kind::Volume(wish) => {
                    take(&flag, &wish.target)?;
                    wishes.push((flag, wish));
                }
                mount::Kind::Memory(memory) => {
                    take(&flag, &memory.target)?;
                    volumes.mounts.push(memory);
                }
            }
        }
        let mut all = Vec::new();
        for (flag, wish) in wishes {
            let found = match &wish.source {
                Wanted::Path(path) => look(path, &flag)?,
                Wanted::Named(name) => Found::Named(name.clone()),
                Wanted::Own => Found::Own,
            };
            all.push((flag, wish, found));
        }
        for (flag, wish, found) in all {
            let source = match found {
                Found::Folder(path) => volumes.add_folder(path, wish.read_only, flag),
                Found::Disk(path) => volumes.add_disk(path, wish.read_only, flag)?,
                Found::Named(name) => {
                    let path = Named::open_default()?.take(&name)?;
                    let disk = volumes.add_disk(path, wish.read_only, flag)?;
                    match disk {
                        Source::Disk(disk) if !wish.read_only && !wish.no_copy => {
                            Source::Volume(disk)
                        }
                        disk => disk,
                    }
                }
                Found::Own => Source::AnonymousVolume,
            };
            volumes.mounts.push(Mount {
                target: wish.target,
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
        path: PathBuf,
        read_only: bool,
        flag: String,
    ) -> Result<Source, Failure> {
        let name = format!("volume{}", self.disks.len());
        let same = |other: &&DiskConfig| other.path == path;
        if let Some(other) = self.disks.iter().find(same)
            && !(other.read_only && read_only)
        {
            return Err(Failure::config(format!(
                "{flag}: {} has that disk, too; only one that is read-only (:ro) can be had twice",
                other.flag()
            )));
        }
        if let (false, Some(folder)) = (read_only, path.parent()) {
            self.written.push(folder.to_owned());
        }
        self.disks
            .push(DiskConfig::of_volume(path, read_only, flag, &name));
        Ok(Source::Disk(name))
    }

    /// Has mounts of disks, which are known by their devices' names, by the paths that the
    /// guest gives these.
    pub fn locate(mounts: &mut [Mount], spec: &MachineSpec) {
        for mount in mounts {
            if let Source::Disk(disk) | Source::Volume(disk) = &mut mount.source
                && let Some(path) = spec.disk_path(disk)
            {
                *disk = path;
            }
        }
    }
}

/// The volumes that an image names, but for those that the user has others for.
pub fn of_image<'a>(
    texts: &[String],
    others: impl IntoIterator<Item = &'a Mount>,
) -> Result<Vec<Mount>, Failure> {
    if texts.len() > OF_IMAGE_MAX {
        return Err(Failure::config(format!(
            "the image has {} of VOLUME; it may have {OF_IMAGE_MAX}",
            texts.len()
        )));
    }
    let plain = |other: &Mount| {
        let target = other.target.strip_suffix(b"/");
        target.unwrap_or(&other.target).to_vec()
    };
    let mut taken: HashSet<_> = others.into_iter().map(plain).collect();
    let mut all = Vec::new();
    for text in texts {
        let failed = |why| {
            let text = text.escape_debug();
            Failure::config(format!("the image's VOLUME {text}: {why}"))
        };
        let target = target(text.as_bytes()).map_err(failed)?;
        if taken.insert(target.clone()) {
            all.push(Mount {
                target,
                source: Source::AnonymousVolume,
                read_only: false,
            });
        }
    }
    Ok(all)
}

/// What is at a path of the host's.
fn look(path: &Path, flag: &str) -> Result<Found, Failure> {
    let metadata = path.metadata().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Failure::config(format!(
            "{flag}: there is no {0}; make the folder first: mkdir -p {0}",
            path.display()
        )),
        _ => file_refusal(&error, flag),
    })?;
    let path = path
        .canonicalize()
        .map_err(|error| file_refusal(&error, flag))?;
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
        let many: Vec<_> = (0..=OF_IMAGE_MAX).map(|it| format!("/{it}")).collect();
        assert_eq!(of_image(&many[1..], &[]).unwrap().len(), OF_IMAGE_MAX);
        let error = of_image(&many, &[]).unwrap_err().to_string();
        assert!(error.contains("257"), "{error}");
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
        ]
        .map(OsString::from);
        let memory = ["type=tmpfs,dst=/m".into()];
        let volumes = Volumes::find(&texts, &memory, &[]).unwrap();
        assert_eq!(volumes.mounts[0].target, b"/m");
        let volumes = Volumes::find(&texts, &[], &[]).unwrap();
        assert_eq!(volumes.folders.len(), 2);
        assert!(volumes.folders[0].read_only && !volumes.folders[1].read_only);
        assert_eq!(volumes.folders[0].path, volumes.folders[1].path);
        assert_eq!(volumes.disks[0].path, disk.canonicalize().unwrap());
        assert!(volumes.disks[0].flag().starts_with("-v "));
        let sources: Vec<_> = volumes.mounts.iter().map(|it| it.source.clone()).collect();
        let expected = [
            Source::Folder("v0".into()),
            Source::Disk("volume0".into()),
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
            let refused = Volumes::find(&[text.into()], &[], &[])
                .unwrap_err()
                .to_string();
            assert!(refused.contains(reason), "{refused}");
        }
        let twice = [format!("{path}:/x"), format!("{path}:/x/")].map(OsString::from);
        let refused = Volumes::find(&twice, &[], &[]).unwrap_err().to_string();
        assert!(refused.contains("another volume"), "{refused}");
        let memory = ["type=tmpfs,dst=/x".into()];
        assert!(Volumes::find(&twice[..1], &memory, &[]).is_err());
        let tmpfs = ["//x/:size=1m".into()];
        assert!(Volumes::find(&twice[..1], &[], &tmpfs).is_err());
        assert!(Volumes::find(&[], &memory, &tmpfs).is_err());
        let twice = [memory.clone(), memory].concat();
        assert!(Volumes::find(&[], &twice, &[]).is_err());
        let twice = [tmpfs.clone(), tmpfs].concat();
        assert!(Volumes::find(&[], &[], &twice).is_ok());
        let disk = |to: &str| format!("{path}/a,disk:/{to}").into();
        let refused = Volumes::find(&[disk("x"), disk("y")], &[], &[]).unwrap_err();
        assert!(refused.to_string().starts_with("-v "), "{refused}");
        assert!(
            refused.to_string().contains("has that disk, too"),
            "{refused}"
        );
        assert!(Volumes::find(&[disk("x:ro"), disk("y:ro")], &[], &[]).is_ok());
    }
}
