//! The built-in container: what Docker's defaults make of an image, with nothing
//! installed. `mayfly compare-container SPEC.json` is one, from its start to its end.
//!
//! The process makes the second one in new namespaces, which finds its files and gives up
//! what Docker's default takes from it, and becomes the command: the first process of its
//! PID namespace, as with Docker. This one passes on signals, waits, and cleans up. It
//! ends with the command's status, 128 and more for signals, 126 and 127 if the command
//! cannot be run or is not there, and 125 if there is no container; standard error says
//! why. When it is killed, the kernel ends all of the container's processes; the directories
//! in [`Spec::writable`] and the control group are left then.
//!
//! It differs from Docker's default in that it always has a user namespace, in which root
//! is the caller; and that its network is the loopback device alone. Programs of 32 bits
//! are ended by the filter of system calls.
//!
//! # What it tells
//!
//! On the descriptor [`Spec::marks`] it writes lines, each in one call:
//!
//! - `launched NS`: `main` was reached, in nanoseconds of `CLOCK_MONOTONIC`;
//! - `built NS`: all is there, and the command is executed next;
//! - `note TEXT`: what this host lacks, and how the container differs therefore.
//!
//! All copies of it are closed when the command runs, but the launcher's.

#![allow(
    unsafe_code,
    reason = "inherited descriptors, and signals in a process with one thread"
)]

mod files;
mod ids;
mod process;
mod spec;

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::Duration;

use mayfly_sandbox::credentials::{self, Ids};
use mayfly_sandbox::{self as sandbox, Bounds, Cgroup, Status};
use rustix::fs::Mode;
use rustix::process::umask;

use self::ids::Mapping;
pub use self::spec::{Spec, Volume};
pub use super::instance::now;
use crate::error::{Context, Error};

/// The status if there is no container: Docker's.
pub const NO_CONTAINER: u8 = 125;

/// All but the control group's, which is made when the process is in its group.
const NAMESPACES: libc::c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWNET;

/// What is passed on to the command.
const FORWARDED: [libc::c_int; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
];

/// So long is waited for the kernel to let go of a group whose processes have ended.
const GROUP_EMPTIES: Duration = Duration::from_millis(200);

/// The pipe that marks are written to.
struct Marks(Option<File>);

impl Marks {
    /// Takes the descriptor, and closes all others that the caller left open.
    fn take(fd: Option<RawFd>) -> io::Result<Self> {
        let close = |first: RawFd, last: RawFd| {
            let (from, to) = (first.cast_unsigned(), last.cast_unsigned());
            // SAFETY: nothing that owns a descriptor was made yet, or is used any more.
            if first <= last && unsafe { libc::close_range(from, to, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        };
        let Some(fd) = fd else {
            close(libc::STDERR_FILENO + 1, RawFd::MAX)?;
            return Ok(Marks(None));
        };
        close(libc::STDERR_FILENO + 1, fd - 1)?;
        close(fd.saturating_add(1), RawFd::MAX)?;
        // SAFETY: numbers.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is open, and the caller gave it for this.
        Ok(Marks(Some(unsafe { OwnedFd::from_raw_fd(fd) }.into())))
    }

    /// Nobody may listen any more: that is no reason to end.
    fn say(&self, line: &str) {
        if let Marks(Some(file)) = self {
            let line = line.replace('\n', " ") + "\n";
            let _ = (&*file).write_all(line.as_bytes());
        }
    }

    fn note(&self, note: &str) {
        self.say(&format!("note {note}"));
    }
}

/// Runs a container from its start to its end, and returns its status. It is for a process
/// that does nothing else. `launched` is when that started.
pub fn run(spec: &Spec, launched: u64) -> Result<u8, Error> {
    spec.check()?;
    let marks = Marks::take(spec.marks).or_invalid("marks")?;
    marks.say(&format!("launched {launched}"));
    let mut words = process::Words::of(spec)?;
    take_signals().or_internal("blocking signals")?;
    let caller = Ids::current();
    let mut layer = Writable::make(spec)?;
    let bounds = Bounds {
        cpus: spec.cpus,
        memory: spec.memory,
        pids: spec.pids,
    };
    let limited = spec.cgroup.is_some() || bounds != Bounds::default();
    let mut group = limited.then(|| Group(Cgroup::bounded(spec.cgroup.as_deref(), &bounds)));
    let entrance = group.as_ref().and_then(|group| group.0.entrance());

    let (mut told, tell) = io::pipe().or_internal("a pipe")?;
    let mut tell = Some(tell);
    let entrance_fd = entrance.as_ref().map(AsRawFd::as_raw_fd);
    let inside = || {
        drop(tell.take());
        // The host's directories are none of the image's business.
        if let Some(fd) = entrance_fd {
            // SAFETY: a number; its owner is not used by this process any more.
            unsafe { libc::close(fd) };
        }
        match become_command(spec, &mut words, &mut told, &marks) {
            Ok(never) => match never {},
            Err(Ended(status, failure)) => {
                let _ = writeln!(
                    io::stderr(),
                    "mayfly: compare-container: {}",
                    failure.text()
                );
                status
            }
        }
    };
    let divided = sandbox::divide(NAMESPACES, entrance.as_ref().map(AsFd::as_fd), inside);
    let (pid, grouped) = divided.or_host("namespaces (user, mnt, pid, ipc, uts, net)")?;
    let init = Init(pid);

    let (mapping, note) = ids::map(pid, caller, (spec.uid, spec.gid))?;
    if let Some(note) = note {
        marks.note(&note);
    }
    if caller.uid != 0 {
        layer.owners = File::open(format!("/proc/{pid}/ns/user")).ok();
    }
    if let Some(Group(group)) = &mut group {
        if !grouped {
            group.add(pid.cast_unsigned());
        }
        if let Status::Absent(why) = group.status() {
            marks.note(&format!("cgroup: {why}"));
        }
    }
    // It may have ended before that; its status tells. The pipe stays: it shows that this
    // process lives.
    let go = tell.as_mut().map(|tell| tell.write_all(&[mapping as u8]));
    drop(go);
    let status = init.follow().or_internal("waiting")?;
    drop(group);
    drop(layer);
    Ok(status)
}

/// Why the second process ends without having become the command.
struct Ended(u8, Error);

impl From<Error> for Ended {
    fn from(failure: Error) -> Self {
        Ended(NO_CONTAINER, failure)
    }
}

/// Makes the second process the command.
fn become_command(
    spec: &Spec,
    words: &mut process::Words,
    told: &mut io::PipeReader,
    marks: &Marks,
) -> Result<std::convert::Infallible, Ended> {
    credentials::die_with_parent().or_internal("its life")?;
    process::isolate(spec)?;
    files::make_private()?;
    let mut mapping = [0];
    // A launcher that has ended has closed its end.
    told.read_exact(&mut mapping)
        .or_host("the launcher ended")?;
    // Its group is the root of what it sees of them.
    process::unshare(libc::CLONE_NEWCGROUP).or_host("a cgroup namespace")?;
    umask(Mode::empty());
    files::build(spec, Mapping::told(mapping), &mut |note| marks.note(note))?;
    umask(Mode::WGRP | Mode::WOTH);
    process::confine(spec, told)?;
    marks.say(&format!("built {}", now()));
    let (status, error) = words.execute();
    let what = format!("{}: {error}", spec.args.first().map_or("", |it| it));
    Err(Ended(status, Error::invalid(what)))
}

/// Has signals wait until they are taken.
fn take_signals() -> io::Result<()> {
    // SAFETY: no handler is installed. A caller that ignores it would have the kernel
    // forget the child's status.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    let set = awaited();
    // SAFETY: a live set.
    match unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn awaited() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills in the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in FORWARDED.into_iter().chain([libc::SIGCHLD]) {
        // SAFETY: it was filled in.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: it was filled in.
    unsafe { set.assume_init() }
}

/// The container's first process. All of them end with this.
struct Init(libc::pid_t);

impl Init {
    fn kill(&self, signal: libc::c_int) {
        // SAFETY: numbers; it was not waited for, so nobody else has its number.
        unsafe { libc::kill(self.0, signal) };
    }

    /// Passes on signals until it has ended.
    fn follow(self) -> io::Result<u8> {
        let set = awaited();
        loop {
            // SAFETY: a live set.
            match unsafe { libc::sigwaitinfo(&set, std::ptr::null_mut()) } {
                libc::SIGCHLD => {
                    if let Some(status) = sandbox::wait(self.0, libc::WNOHANG)? {
                        std::mem::forget(self);
                        let code = status.code().or(status.signal().map(|it| 128 + it));
                        let code = code.and_then(|code| u8::try_from(code).ok());
                        return Ok(code.unwrap_or(NO_CONTAINER));
                    }
                }
                signal @ 1.. => self.kill(signal),
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        self.kill(libc::SIGKILL);
        let _ = sandbox::wait(self.0, 0);
    }
}

/// What the container writes, removed with this.
struct Writable {
    upper: PathBuf,
    work: PathBuf,
    /// The user namespace in which the owners of all files are known.
    owners: Option<File>,
}

impl Writable {
    fn make(spec: &Spec) -> Result<Self, Error> {
        let about = fs::metadata(&spec.root).or_invalid(spec.root.display())?;
        let make = |name| {
            let directory = spec.writable.join(name);
            fs::create_dir(&directory).or_invalid(directory.display())?;
            Ok::<_, Error>(directory)
        };
        let upper = make("upper")?;
        let made = Writable {
            upper,
            work: spec.writable.join("work"),
            owners: None,
        };
        make("work")?;
        // They become the root directory's own.
        let mode = Permissions::from_mode(about.permissions().mode() & 0o7777);
        fs::set_permissions(&made.upper, mode).or_host(made.upper.display())?;
        Ok(made)
    }
}

impl Drop for Writable {
    fn drop(&mut self) {
        if let Some(owners) = &self.owners {
            // Files may belong to others than the caller, who is root of them there.
            let _ = process::enter_user_namespace(owners.as_fd());
        }
        for directory in [&self.upper, &self.work] {
            if let Err(error) = fs::remove_dir_all(directory) {
                log::warn!("{}: {error}", directory.display());
            }
        }
    }
}

/// Groups that are removed when all processes have ended.
struct Group(Cgroup);

impl Drop for Group {
    fn drop(&mut self) {
        let pause = Duration::from_millis(1);
        for directory in self.0.directories() {
            let mut waited = Duration::ZERO;
            while fs::remove_dir(directory).is_err() && directory.exists() && waited < GROUP_EMPTIES
            {
                std::thread::sleep(pause);
                waited += pause;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        Spec {
            args: vec!["sh".into()],
            ..Spec::default()
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(spec().check().is_ok());
        let wrong: [fn(&mut Spec); 8] = [
            |spec| spec.args.clear(),
            |spec| spec.args = vec![String::new()],
            |spec| spec.cgroup = Some("../x".into()),
            |spec| spec.cgroup = Some("..".into()),
            |spec| spec.cwd = Some("tmp".into()),
            |spec| spec.cpus = Some(0.0),
            |spec| spec.cpus = Some(f64::NAN),
            |spec| spec.marks = Some(2),
        ];
        for (number, spoil) in wrong.into_iter().enumerate() {
            let mut spec = spec();
            spoil(&mut spec);
            assert!(spec.check().is_err(), "{number}");
        }
    }

    #[test]
    fn a_specification_says_nothing_unknown() {
        let text = r#"{"root": "/r", "writable": "/w", "args": ["a"], "hostname": "h"}"#;
        let spec: Spec = serde_json::from_str(text).unwrap();
        assert_eq!((spec.uid, spec.marks, spec.volumes.len()), (0, None, 0));
        let unknown = text.replace("\"hostname\"", "\"privileged\": true, \"hostname\"");
        assert!(serde_json::from_str::<Spec>(&unknown).is_err());
    }
}
