//! Where a guest's kernel comes from: the host's own, or a Debian package.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::store::FETCHED;
use crate::failure::{Failure, OrFail};
use mayfly_process::programs::find_program;

/// The packages that depend on Debian's kernel for virtual machines, the newest first:
/// Debian 12 has 6.12 beside its own 6.1, later ones have it under the plain name.
const PACKAGES: [&str; 2] = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];

/// A kernel and its modules.
pub(super) struct Source {
    /// What the guest is called.
    pub name: String,
    /// vmlinuz or vmlinux.
    pub kernel: PathBuf,
    /// The folder with `modules.dep`.
    pub modules: PathBuf,
}

/// The kernel that the host runs, if its files are there and may be read.
pub(super) fn of_host() -> Option<Source> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let name = release.trim();
    let modules = Path::new("/lib/modules").join(name);
    let kernels = [
        PathBuf::from(format!("/boot/vmlinuz-{name}")),
        modules.join("vmlinuz"),
    ];
    let kernel = kernels
        .into_iter()
        .find(|path| fs::File::open(path).is_ok());
    Some(Source {
        kernel: kernel.filter(|_| modules.join("modules.dep").is_file())?,
        name: name.to_owned(),
        modules,
    })
}

/// Whether this is a Debian, whose packages can be fetched.
pub(super) fn is_debian() -> bool {
    ["apt-get", "apt-cache", "dpkg-deb", "depmod"]
        .iter()
        .all(|name| tool(name).is_some())
        && Path::new("/etc/debian_version").exists()
}

/// Debian's kernel for virtual machines, from its package, which is fetched into a folder
/// of its own below `kernels` and stays there. Nothing is installed, and no privileges are
/// needed.
pub(super) fn of_debian(kernels: &Path) -> Result<Source, Failure> {
    let package = find_package()?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    let folder = kernels.join(format!("{FETCHED}{release}"));
    if !folder.exists() {
        fs::create_dir_all(kernels).or_host(kernels.display())?;
        let work = tempfile::tempdir_in(kernels).or_host(kernels.display())?;
        let unpacked = unpack(&package, work.path())?;
        fs::rename(&unpacked, &folder).or_host(folder.display())?;
    }
    Ok(Source {
        name: release,
        kernel: folder.join("vmlinuz"),
        modules: folder.join("modules"),
    })
}

/// Fetches and unpacks a kernel's package. Returns a folder with `vmlinuz` and `modules`.
fn unpack(package: &str, work: &Path) -> Result<PathBuf, Failure> {
    // As root, apt would read as another user, that cannot write there.
    output(
        command("apt-get")?
            .args(["download", "-q", "-o", "APT::Sandbox::User=root", package])
            .current_dir(work),
    )
    .or_host(format_args!("fetching {package}"))?;
    let file = first_entry(work, |name| name.ends_with(".deb")).or_host(package)?;
    let tree = work.join("tree");
    output(command("dpkg-deb")?.arg("-x").args([&file, &tree]))
        .or_host(format_args!("unpacking {package}"))?;
    let kernel = first_entry(&tree.join("boot"), |name| name.starts_with("vmlinuz-"));
    let kernel = kernel.or_host(package)?;
    // Debian 13 has the modules below /usr.
    let usr = tree.join("usr");
    let base = match usr.join("lib/modules").is_dir() {
        true => usr,
        false => tree,
    };
    let modules = first_entry(&base.join("lib/modules"), |_| true).or_host(package)?;
    // The package lacks modules.dep: its installation script would make it.
    let release = modules.file_name().unwrap_or_default();
    output(command("depmod")?.arg("-b").arg(&base).arg(release))
        .or_host(format_args!("listing the modules of {package}"))?;
    let unpacked = work.join("unpacked");
    let moved = fs::create_dir(&unpacked)
        .and_then(|()| fs::rename(kernel, unpacked.join("vmlinuz")))
        .and_then(|()| fs::rename(&modules, unpacked.join("modules")));
    moved.or_host(package)?;
    Ok(unpacked)
}

/// The package with the kernel itself.
fn find_package() -> Result<String, Failure> {
    for package in PACKAGES {
        let text = output(command("apt-cache")?.args(["depends", "--no-recommends", package]));
        let depends = text.unwrap_or_default();
        let kernel = depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"));
        // Known only by name, with no version to fetch, does not count.
        if let Some(kernel) = kernel
            && output(command("apt-cache")?.args(["show", kernel])).is_ok()
        {
            return Ok(kernel.to_owned());
        }
    }
    Err(Failure::host(format!(
        "apt knows neither {}; try apt-get update as root",
        PACKAGES.join(" nor ")
    )))
}

/// A program that an ordinary user may run, though it is where root's are.
fn tool(name: &str) -> Option<PathBuf> {
    let folders = ["/usr/sbin", "/sbin"].map(|folder| Path::new(folder).join(name));
    find_program(name).or_else(|| folders.into_iter().find(|path| path.is_file()))
}

fn command(name: &str) -> Result<Command, Failure> {
    let path = tool(name).ok_or_else(|| Failure::host(format!("{name} is not installed")))?;
    Ok(Command::new(path))
}

/// Runs a program to its end. What it says when it fails is the error.
fn output(command: &mut Command) -> io::Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty());
    let last = last.map_or_else(|| output.status.to_string(), str::to_owned);
    Err(io::Error::other(last))
}

fn first_entry(folder: &Path, is: impl Fn(&str) -> bool) -> io::Result<PathBuf> {
    let entries = fs::read_dir(folder)?.flatten();
    let mut matching = entries.filter(|entry| is(&entry.file_name().to_string_lossy()));
    match matching.next() {
        Some(entry) => Ok(entry.path()),
        None => Err(io::Error::other("the package lacks its files")),
    }
}
