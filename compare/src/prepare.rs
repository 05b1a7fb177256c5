//! What all engines are given: the image's files, with the probe between them.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use mayfly_image::{Digest, Image, Progress, PullOptions, RunConfig, Store};

use super::engines::{PROBE, Place};
use super::guard::Workspace;
use super::options::Options;
use crate::error::{Context, Error};

/// The image's files are there themselves and, at times, as an archive, as mayfly's layer
/// and as a disk.
const COPIES: u64 = 4;
/// The name of the image that mayfly runs, in a store of its own.
const NAME: &str = "compared";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Directories that engines mount something at.
const MOUNT_POINTS: [&str; 7] = ["proc", "sys", "dev", "run", "tmp", "etc", ".mayfly-volume"];

/// Gets the image, unpacks it, and puts it where each engine wants it.
pub fn prepare<'a>(
    options: &'a Options,
    progress: &dyn Progress,
    workspace: &Workspace,
) -> Result<(Place<'a>, Image), Error> {
    let mayfly = &options.mayfly;
    let store = Store::open(&mayfly.store)?;
    let image = store.obtain(&options.image, &PullOptions::default(), progress)?;
    let size = image.size.saturating_mul(COPIES);
    // The host can only forget what is on a disk.
    let files = match options.drop_caches {
        true => workspace.disk_for(size)?,
        false => workspace.directory_for(size)?,
    };
    let root = files.join("root");
    image.unpack(&root)?;
    for directory in MOUNT_POINTS {
        let path = root.join(directory);
        // A link may lead outside.
        if fs::symlink_metadata(&path).is_err() {
            fs::create_dir(&path).or_host(path.display())?;
        }
    }
    let guest = &mayfly.guest;
    let probe = guest.probe.clone().ok_or_else(|| {
        Error::invalid(format!(
            "the guest {} has no program to compare with; make it anew with mayfly guest make",
            guest.name
        ))
    })?;
    let inside = root.join(PROBE.trim_start_matches('/'));
    if fs::symlink_metadata(&inside).is_ok() {
        fs::remove_file(&inside).or_host(inside.display())?;
    }
    fs::copy(&probe, &inside).or_host(inside.display())?;
    fs::set_permissions(&inside, fs::Permissions::from_mode(0o755)).or_host(inside.display())?;

    // Who compares has itself in memory, and shares that with whom it launches: a part of
    // their memory would not be counted, and files in use are not forgotten.
    let program = root.with_file_name("mayfly");
    let own = env::current_exe().or_host("mayfly")?;
    fs::copy(own, &program).or_host(program.display())?;

    let config = RunConfig {
        env: environment(&image.config.config.env),
        ..RunConfig::default()
    };
    let data = files.join("data");
    let store = Store::open(&data.join("mayfly"))?;
    let name = NAME.parse().or_internal(NAME)?;
    store.import(&root, Some(&name), config.clone(), progress)?;
    let place = Place {
        directory: workspace.directory.clone(),
        program,
        root,
        probe,
        data,
        image: NAME.to_owned(),
        env: config.env,
        cpus: options.cpus,
        memory_mib: options.memory_mib,
        mayfly,
    };
    Ok((place, image))
}

/// What all engines have the command find: `PATH`, as `mayfly run` has it, then the image's
/// variables. The last one of a name counts, and is the only one, as engines choose
/// differently among several; so do they where one has no name or no value, and it is left
/// out.
fn environment(image: &[String]) -> Vec<String> {
    let mut all = BTreeMap::new();
    for variable in [PATH].into_iter().chain(image.iter().map(String::as_str)) {
        match variable.split_once('=') {
            Some((name, _)) if !name.is_empty() && !variable.contains('\0') => {
                all.insert(name, variable);
            }
            _ => {}
        }
    }
    all.into_values().map(str::to_owned).collect()
}

/// The digests of what VMs boot: by them, two comparisons can be told to be of one kernel.
pub fn guest_files(place: &Place) -> Result<BTreeMap<String, String>, Error> {
    let guest = &place.mayfly.guest;
    let Some(initrd) = &guest.initrd else {
        return Ok(BTreeMap::new());
    };
    let files = [&guest.kernel, initrd].into_iter().chain(&guest.run_initrd);
    let digest = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let data = fs::read(path).or_host(path.display())?;
        Ok((name.into_owned(), Digest::of(&data).to_string()))
    };
    files.filter(|path| path.exists()).map(digest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_has_a_path_and_each_name_once() {
        let of =
            |image: &[&str]| environment(&image.iter().map(|&it| it.into()).collect::<Vec<_>>());
        assert_eq!(of(&[]), [PATH]);
        assert_eq!(of(&["LANG=C"]), ["LANG=C", PATH]);
        assert_eq!(
            of(&["PATH=/a", "A=1", "PATH=/b", "A=2=3"]),
            ["A=2=3", "PATH=/b"]
        );
        assert_eq!(of(&["HOST", "=x", "A=\0", "B="]), ["B=", PATH]);
    }
}
