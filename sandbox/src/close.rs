//! The VMM's half: it locks itself in.

#![allow(unsafe_code, reason = "a process's own limits and descriptors")]

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use super::confinement::ThreadConfinement;
use super::credentials::{self, Ids};
use super::error::{Context, Error, refusal};
use super::landlocked::landlock;
use super::layers::{Layer, Status};
use super::lifeline;
use super::policy::Mode;
use super::seccomp;
use super::setup::SandboxSetup;
use super::status::PANIC;

/// What the VMM may take of the host.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Descriptors have smaller numbers.
    pub files: u64,
    /// A file that it writes to does not grow past this.
    pub file_size: Option<u64>,
    /// The address space beyond what it has when the sandbox closes: threads' stacks,
    /// and memory that it allocates.
    pub address_space_extra: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            files: 4096,
            file_size: None,
            address_space_extra: None,
        }
    }
}

/// The descriptors that stay open.
#[derive(Clone, Copy, Debug)]
pub enum Keep<'a> {
    /// All, where inherited ones were closed before.
    All,
    /// These descriptors only.
    Only(&'a [RawFd]),
}

impl SandboxSetup {
    /// Closes all descriptors but some: what the supervisor had open, and whoever started it.
    /// To be called before anything is made that owns one.
    pub fn close_inherited(&self, keep: &[RawFd]) -> io::Result<()> {
        let own = self.lifeline.as_raw_fd();
        for fd in descriptors()? {
            if fd != own && !keep.contains(&fd) {
                // SAFETY: a number; what owns it is not used by this process any more.
                unsafe { libc::close(fd) };
            }
        }
        Ok(())
    }

    /// Closes the sandbox: nothing can be opened, and nobody found, from here on. It is
    /// for the main thread. Each thread [confines](ThreadConfinement::confine) itself after.
    pub fn close(mut self, limits: &Limits, keep: Keep) -> Result<ThreadConfinement, Error> {
        if self.mode == Mode::Off {
            return confinement(None, self);
        }
        // These look at /proc, which is gone then.
        if let Keep::Only(keep) = keep {
            self.close_inherited(keep).or_host("closing descriptors")?;
        }
        no_directory(&descriptors().or_host("listing descriptors")?)?;
        self.report.set(Layer::Descriptors, Status::Active);
        let address_space = address_space().or_host("reading /proc/self/statm")?;

        if self.namespaces & libc::CLONE_NEWUSER != 0 {
            // The limit is this namespace's own: in another one, within it, there would be
            // capabilities again. Containers may refuse it; the filters still do.
            let _ = fs::write("/proc/sys/user/max_user_namespaces", "0");
        }
        if let Some(ids) = self.ids {
            let became = credentials::become_user(ids);
            if became.is_err() {
                // Nor will other threads.
                self.ids = None;
            }
            self.note(Layer::Uid, became)?;
        }
        if self.namespaces & libc::CLONE_NEWNS != 0 {
            self.note(Layer::Mounts, empty_root())?;
        }
        self.note(Layer::Limits, limit(limits, address_space))?;
        self.note(Layer::Capabilities, credentials::drop_capabilities())?;
        self.note(Layer::NoNewPrivileges, credentials::no_new_privileges())?;
        self.note(Layer::NotDumpable, credentials::not_dumpable())?;
        self.outlive_nobody().or_host("the supervisor has ended")?;
        match landlock() {
            Ok(status) => self.report.set(Layer::Landlock, status),
            Err(error) => self.note(Layer::Landlock, Err(io::Error::other(error)))?,
        }
        self.note(Layer::Seccomp, seccomp::available())?;
        seccomp::install_handler().or_internal("installing a signal handler")?;
        default_signals().or_internal("setting a signal's action")?;
        end_by_panic();

        if self.mode == Mode::Require
            && let Some((layer, why)) = self.report.missing()
        {
            return Err(Error::Refused(refusal(layer, &why)));
        }
        confinement(self.ids, self)
    }

    /// Notes how a layer fares. One that was missed before stays so.
    fn note(&mut self, layer: Layer, result: io::Result<()>) -> Result<(), Error> {
        match (result, self.report.get(layer)) {
            (Ok(()), None) => self.report.set(layer, Status::Active),
            (Ok(()), Some(_)) => {}
            (Err(error), _) if self.mode == Mode::Require => {
                return Err(Error::Refused(refusal(layer, &error)));
            }
            (Err(error), _) => self.report.set(layer, Status::Absent(error.to_string())),
        }
        Ok(())
    }

    /// Dies with the supervisor, also now that credentials have changed.
    fn outlive_nobody(&self) -> io::Result<()> {
        credentials::die_with_parent()?;
        lifeline::check(&self.lifeline)
    }
}

fn confinement(ids: Option<Ids>, setup: SandboxSetup) -> Result<ThreadConfinement, Error> {
    let confinement = ThreadConfinement::new(setup.mode, ids, setup.report, setup.barrier);
    confinement.ok_or(Error::GivenUp)
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The descriptors that are open.
pub fn descriptors() -> io::Result<Vec<RawFd>> {
    let names = fs::read_dir("/proc/self/fd")?.map(|entry| Ok(entry?.file_name()));
    let names = names.collect::<io::Result<Vec<_>>>()?;
    let all = names
        .iter()
        .filter_map(|name| name.to_str()?.parse().ok())
        // The directory's own is closed again.
        // SAFETY: numbers.
        .filter(|&fd: &RawFd| unsafe { libc::fcntl(fd, libc::F_GETFD) } != -1);
    Ok(all.collect())
}

/// From a directory that is held, all of the host's file system can be reached.
fn no_directory(descriptors: &[RawFd]) -> Result<(), Error> {
    for &fd in descriptors {
        let mut about = std::mem::MaybeUninit::<libc::stat>::uninit();
        // SAFETY: fills in the structure, or fails.
        if unsafe { libc::fstat(fd, about.as_mut_ptr()) } != 0 {
            continue;
        }
        // SAFETY: the call succeeded.
        let about = unsafe { about.assume_init() };
        if about.st_mode & libc::S_IFMT == libc::S_IFDIR {
            return Err(Error::Directory(fd));
        }
    }
    Ok(())
}

/// How much the process has mapped.
fn address_space() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/statm")?;
    let pages = text
        .split(' ')
        .next()
        .and_then(|text| text.parse::<u64>().ok());
    let pages = pages.ok_or(io::ErrorKind::InvalidData)?;
    // SAFETY: a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Ok(pages.saturating_mul(u64::try_from(page).unwrap_or(4096)))
}

/// Replaces the root of this mount namespace by a directory in which nothing is, nor can be.
fn empty_root() -> io::Result<()> {
    let none = std::ptr::null();
    let mount = |from: *const libc::c_char, to: &std::ffi::CStr, kind, flags, options| {
        // SAFETY: strings that end in zero, or none.
        check(unsafe { libc::mount(from, to.as_ptr(), kind, flags, options) })
    };
    // Nothing shows on the host then.
    let private = libc::MS_REC | libc::MS_PRIVATE;
    mount(none, c"/", none, private, none.cast())?;
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let options = c"size=4k,nr_inodes=1,mode=0".as_ptr();
    // Every host has this directory, and it is not looked at any more.
    let place = c"/proc";
    mount(
        c"mayfly".as_ptr(),
        place,
        c"tmpfs".as_ptr(),
        flags,
        options.cast(),
    )?;
    std::env::set_current_dir(Path::new("/proc"))?;
    let here = c".".as_ptr();
    // The old root comes to lie over the new one, and is what "." means (pivot_root(2)).
    // SAFETY: strings that end in zero.
    let pivoted = unsafe { libc::syscall(libc::SYS_pivot_root, here, here) };
    if pivoted != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a string that ends in zero.
    check(unsafe { libc::umount2(here, libc::MNT_DETACH) })?;
    std::env::set_current_dir(Path::new("/"))
}

/// Sets limits, which cannot be raised again.
fn limit(limits: &Limits, address_space: u64) -> io::Result<()> {
    let extra = limits.address_space_extra;
    let room = extra.map(|extra| address_space.saturating_add(extra));
    let all = [
        (libc::RLIMIT_CORE, Some(0)),
        (libc::RLIMIT_MSGQUEUE, Some(0)),
        (libc::RLIMIT_NICE, Some(0)),
        (libc::RLIMIT_RTPRIO, Some(0)),
        (libc::RLIMIT_NOFILE, Some(limits.files)),
        (libc::RLIMIT_FSIZE, limits.file_size),
        (libc::RLIMIT_AS, room),
    ];
    for (resource, value) in all {
        let Some(value) = value else { continue };
        let mut now = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: fills in a live structure.
        check(unsafe { libc::getrlimit(resource, &mut now) })?;
        let value = value.min(now.rlim_max);
        let limit = libc::rlimit {
            rlim_cur: value,
            rlim_max: value,
        };
        // SAFETY: reads a live structure.
        check(unsafe { libc::setrlimit(resource, &limit) })?;
    }
    Ok(())
}

/// A fault ends the process at once, by the kernel: Rust's handlers would ask for what is
/// forbidden now. A file that would grow past its limit is an error, not the end.
fn default_signals() -> io::Result<()> {
    let actions = [
        (libc::SIGSEGV, libc::SIG_DFL),
        (libc::SIGBUS, libc::SIG_DFL),
        (libc::SIGXFSZ, libc::SIG_IGN),
        (libc::SIGPIPE, libc::SIG_IGN),
    ];
    for (signal, action) in actions {
        // SAFETY: no handler is installed.
        if unsafe { libc::signal(signal, action) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A panic says where it is, and ends the process: `abort` would need system calls that
/// nothing else does, and its signal does not reach the first process of a namespace.
pub fn end_by_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let text = format!("mayfly: thread {name:?} {panic}\n");
        let _ = io::stderr().write_all(text.as_bytes());
        // SAFETY: ends the process; nothing runs after.
        unsafe { libc::_exit(PANIC.into()) };
    }));
}
