//! The supervisor's half: the VMM process, in namespaces of its own.

#![allow(unsafe_code, reason = "processes are divided, and become programs")]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use super::close::{Keep, Limits};
use super::credentials::{self, Ids};
use super::error::refusal;
use super::execute::{Program, execute};
use super::layers::{Layer, Report, Status};
use super::lifeline::check;
use super::policy::{Mode, Policy};
use super::setup::{PreparedSandbox, SandboxSetup};
use super::status::{PANIC, not_executed};

/// Users of VMs: from here on, one for each. Nobody gives these out: they are above what
/// systemd, containers and directories of users take.
const VM_UIDS: u32 = 0x7100_0000;

/// `linux/sched.h`: past what libc's type for flags holds.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The namespaces, and their layers. The first owns the others.
const NAMESPACES: [(libc::c_int, Layer); 7] = [
    (libc::CLONE_NEWUSER, Layer::UserNamespace),
    (libc::CLONE_NEWNS, Layer::Mounts),
    (libc::CLONE_NEWPID, Layer::Pid),
    (libc::CLONE_NEWIPC, Layer::Ipc),
    (libc::CLONE_NEWUTS, Layer::Uts),
    (libc::CLONE_NEWCGROUP, Layer::CgroupNamespace),
    (libc::CLONE_NEWNET, Layer::Network),
];

/// The VMM process. It ends with this, and with the supervisor.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    /// The VMM ends when this does.
    _lifeline: File,
    status: Option<ExitStatus>,
}

/// Who the VMM is to become; the supervisor tells when it has seen to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Mapped {
    /// A user of its own is root inside.
    Vm = b'v',
    /// The supervisor's user is.
    Own = b'o',
    /// Nobody is.
    Nobody = b'n',
}

/// How long the kernel may take to end a process that was killed.
const KILL_TIMEOUT_MS: libc::c_int = 10_000;

/// Ends the process at once: what a language does at an end needs system calls that the
/// sandbox forbids.
pub fn exit(status: u8) -> ! {
    // SAFETY: ends the process; nothing runs after.
    unsafe { libc::_exit(status.into()) }
}

/// Ends the process rather than let it return, or unwind, into its caller's frames.
struct NoReturn;

impl Drop for NoReturn {
    fn drop(&mut self) {
        exit(PANIC)
    }
}

/// Starts the VMM. It runs `child` and ends with the status that this returns.
///
/// The caller has one thread: of all others the VMM would have the locks, but not the
/// threads that open them.
pub fn spawn(policy: &Policy, child: impl FnOnce(SandboxSetup) -> u8) -> io::Result<Child> {
    let child = |start: &Start, lifeline: File, mapped| {
        let setup = SandboxSetup::resume(start.prepared(mapped), lifeline.into());
        setup.map_or(PANIC, child)
    };
    start(policy, child).map(|(child, _)| child)
}

/// Starts a program as the VMM, anew: it has nothing of this process's memory, environment
/// and descriptors. It is to [resume](SandboxSetup::resume) what is returned.
///
/// The caller has one thread, as with [`spawn`].
pub fn spawn_program(policy: &Policy, program: &Program) -> io::Result<(Child, PreparedSandbox)> {
    start(policy, |_, lifeline, _| {
        // It ends here only if it fails.
        let Err(error) = execute(program, lifeline);
        not_executed(&error)
    })
}

/// The parts that a VMM process starts with.
struct Start {
    mode: Mode,
    namespaces: libc::c_int,
    report: Report,
    supervisor: Ids,
    wanted: Ids,
}

/// What the supervisor did to map users, and the error if it did less than it wanted.
type Mapping = (Mapped, i32);

impl Start {
    /// Who the VMM is to become, and how the layers fare, once users are mapped.
    fn prepared(&self, (mapped, error): Mapping) -> PreparedSandbox {
        let why = io::Error::from_raw_os_error(error).to_string();
        let root = self.supervisor.uid == 0;
        let alone = self.namespaces & libc::CLONE_NEWUSER == 0;
        let ids = match mapped {
            _ if self.mode == Mode::Off => None,
            // Without a user namespace, root can become anybody, and others nobody.
            _ if alone => root.then_some(self.wanted),
            Mapped::Nobody => None,
            _ => Some(Ids { uid: 0, gid: 0 }),
        };
        let mut report = self.report.clone();
        if self.mode != Mode::Off {
            let good = !root || alone || mapped == Mapped::Vm;
            let status = match good {
                true => Status::Active,
                false => Status::Absent(format!("mapping one: {why}")),
            };
            report.set(Layer::Uid, status);
        }
        PreparedSandbox {
            mode: self.mode,
            ids,
            report,
            namespaces: self.namespaces,
        }
    }
}

/// Starts the VMM, which runs `child` when its users are mapped.
fn start(
    policy: &Policy,
    child: impl FnOnce(&Start, File, Mapping) -> u8,
) -> io::Result<(Child, PreparedSandbox)> {
    alone()?;
    let wanted = namespaces(policy);
    let (mut theirs, mut ours) = pipe()?;
    let supervisor = Ids::current();
    let ids = match supervisor.uid {
        // SAFETY: touches no memory.
        0 => Ids::of(VM_UIDS.wrapping_add(unsafe { libc::getpid() }.cast_unsigned())),
        _ => supervisor,
    };
    // Nearly always all namespaces are granted, and are asked for once.
    let mut granted = wanted.iter().fold(0, |all, (flag, _)| all | flag);
    let mut refusals = Vec::new();
    let cloned = match clone(granted) {
        Err(_) if granted != 0 => {
            (granted, refusals) = explore(policy.mode, &wanted)?;
            clone(granted)?
        }
        cloned => cloned?,
    };
    let start = Start {
        mode: policy.mode,
        namespaces: granted,
        report: report(policy.mode, &wanted, refusals),
        supervisor,
        wanted: ids,
    };
    let Some((pid, pidfd)) = cloned else {
        let _guard = NoReturn;
        drop(ours);
        let status = match begin(&mut theirs) {
            Ok(mapped) => child(&start, theirs, mapped),
            Err(_) => PANIC,
        };
        exit(status)
    };
    drop(theirs);
    let mapped = match granted & libc::CLONE_NEWUSER {
        0 => (Mapped::Nobody, 0),
        _ => map(pid, supervisor, ids),
    };
    let [a, b, c, d] = mapped.1.to_le_bytes();
    // One that was killed already does not read it; who waits for its end tells why.
    let _ = ours.write_all(&[mapped.0 as u8, a, b, c, d]);
    let child = Child {
        pid,
        pidfd,
        _lifeline: ours,
        status: None,
    };
    Ok((child, start.prepared(mapped)))
}

/// Divides this process, which has one thread, as [`spawn`] does: the second is in new
/// namespaces and in a control group of version 2, if one is given and takes it. It runs
/// `child` and ends with the status that this returns. Returns its number and whether it
/// is in the group.
pub fn divide(
    namespaces: libc::c_int,
    group: Option<BorrowedFd>,
    child: impl FnOnce() -> u8,
) -> io::Result<(libc::pid_t, bool)> {
    alone()?;
    let (cloned, grouped) = match group.map(|group| clone_into(namespaces, group)) {
        Some(Ok(cloned)) => (cloned, true),
        // An old kernel, or a group that may not have it.
        Some(Err(_)) | None => (clone(namespaces)?, false),
    };
    let Some((pid, _pidfd)) = cloned else {
        let _guard = NoReturn;
        let status = child();
        exit(status)
    };
    Ok((pid, grouped))
}

/// Fails if this process has more than one thread.
fn alone() -> io::Result<()> {
    // One that was joined may be there for another moment.
    const MOMENT: Duration = Duration::from_secs(1);
    let deadline = Instant::now() + MOMENT;
    while fs::read_dir("/proc/self/task")?.count() != 1 {
        if Instant::now() >= deadline {
            let why = "a process is divided while it has one thread";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        thread::sleep(MOMENT / 1000);
    }
    Ok(())
}

/// How all layers fare on this host, shown by a VMM without a machine.
pub fn probe(policy: &Policy) -> io::Result<Report> {
    let (mut theirs, mut ours) = pipe()?;
    let kept = ours.as_raw_fd();
    let mut child = spawn(policy, |setup| {
        let confinement = setup.close(&Limits::default(), Keep::Only(&[0, 1, 2, kept]));
        let told = match confinement {
            Ok(confinement) => serde_json::to_vec(&Ok::<_, String>(confinement.report())),
            Err(failure) => serde_json::to_vec(&Err::<Report, _>(failure.to_string())),
        };
        let told = told.map_err(io::Error::from);
        u8::from(told.and_then(|told| ours.write_all(&told)).is_err())
    })?;
    // The VMM has the only one that is left.
    drop(ours);
    let mut told = Vec::new();
    theirs.read_to_end(&mut told)?;
    child.wait()?;
    let told: Result<Report, String> = serde_json::from_slice(&told)?;
    told.map_err(io::Error::other)
}

/// A namespace, and the layer that it makes.
type Namespace = (libc::c_int, Layer);

/// The namespaces that are wanted.
fn namespaces(policy: &Policy) -> Vec<Namespace> {
    let mut wanted = NAMESPACES.to_vec();
    wanted.retain(|(flag, _)| match *flag {
        _ if policy.mode == Mode::Off => false,
        libc::CLONE_NEWNET => policy.new_net,
        _ => true,
    });
    wanted
}

/// Which namespaces the host grants, and why not the others.
fn explore(mode: Mode, wanted: &[Namespace]) -> io::Result<(libc::c_int, Vec<(Layer, io::Error)>)> {
    let mut granted = 0;
    let mut refusals = Vec::new();
    for &(flag, layer) in wanted {
        match attempt(granted | flag) {
            Ok(()) => granted |= flag,
            Err(error) if mode == Mode::Require => return Err(missing(layer, &error)),
            Err(error) => refusals.push((layer, error)),
        }
    }
    Ok((granted, refusals))
}

/// The state of the namespaces.
fn report(mode: Mode, wanted: &[Namespace], refusals: Vec<(Layer, io::Error)>) -> Report {
    if mode == Mode::Off {
        return Report::off();
    }
    let mut report = Report::default();
    for (_, layer) in NAMESPACES {
        let status = match wanted.iter().any(|(_, it)| *it == layer) {
            true => Status::Active,
            false => Status::Off,
        };
        report.set(layer, status);
    }
    for (layer, error) in refusals {
        report.set(layer, Status::Absent(error.to_string()));
    }
    report
}

/// The error of a host that lacks a layer.
fn missing(layer: Layer, why: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(refusal(layer, why))
}

/// Makes namespaces, for a process that ends at once.
fn attempt(flags: libc::c_int) -> io::Result<()> {
    let Some((pid, _pidfd)) = clone(flags)? else {
        // SAFETY: ends the process; nothing runs after.
        unsafe { libc::_exit(0) };
    };
    wait(pid, 0).map(drop)
}

/// Divides this process in two, the second in new namespaces; `None` is in that one.
fn clone(namespaces: libc::c_int) -> io::Result<Option<(libc::pid_t, OwnedFd)>> {
    let (tid, tid_flags) = tid_address();
    let flags = namespaces | libc::CLONE_PIDFD | libc::SIGCHLD | tid_flags;
    let mut pidfd: libc::c_int = -1;
    let no_stack = 0usize;
    // SAFETY: without CLONE_VM the child has a copy of all memory and of this stack. This
    // process has one thread (`spawn` looked), so no lock is held by one that is not there.
    // `tid` is where the kernel itself says that the thread's id is.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            flags,
            no_stack,
            &raw mut pidfd,
            tid,
            0usize,
        )
    };
    cloned(pid, pidfd)
}

/// The same, the second in a control group from its start: it is not moved, for which the
/// kernel has all processes wait.
fn clone_into(
    namespaces: libc::c_int,
    group: BorrowedFd,
) -> io::Result<Option<(libc::pid_t, OwnedFd)>> {
    let (tid, tid_flags) = tid_address();
    let flags = namespaces | libc::CLONE_PIDFD | tid_flags;
    let mut pidfd: libc::c_int = -1;
    // SAFETY: all zeroes are a value of it.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from(flags.cast_unsigned()) | CLONE_INTO_CGROUP;
    args.exit_signal = libc::SIGCHLD as u64;
    args.pidfd = (&raw mut pidfd).addr() as u64;
    args.child_tid = tid.addr() as u64;
    args.cgroup = u64::from(group.as_raw_fd().cast_unsigned());
    let size = size_of::<libc::clone_args>();
    // SAFETY: as in `clone`; the arguments are live, and point to what is.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size) };
    cloned(pid, pidfd)
}

/// Where glibc keeps the thread's id, and has the kernel clear it, and the flags for that.
fn tid_address() -> (*mut libc::pid_t, libc::c_int) {
    let mut tid: *mut libc::pid_t = std::ptr::null_mut();
    // SAFETY: fills in a live pointer, or fails.
    match unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut tid) } {
        0 if !tid.is_null() => (tid, libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID),
        _ => (std::ptr::null_mut(), 0),
    }
}

/// What a call returned that divides the process.
fn cloned(pid: libc::c_long, pidfd: libc::c_int) -> io::Result<Option<(libc::pid_t, OwnedFd)>> {
    match pid {
        ..0 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        _ => {
            let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
            // SAFETY: it is new, and nothing else owns it.
            Ok(Some((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })))
        }
    }
}

/// Says who is root inside, and why it is not a user of the VM's own, if so.
fn map(pid: libc::pid_t, supervisor: Ids, wanted: Ids) -> Mapping {
    let directory = format!("/proc/{pid}");
    let write = |name: &str, text: &str| fs::write(format!("{directory}/{name}"), text);
    let put = |ids: Ids| {
        write("gid_map", &format!("0 {} 1\n", ids.gid))?;
        write("uid_map", &format!("0 {} 1\n", ids.uid))
    };
    let mut code = 0;
    if supervisor.uid == 0 {
        match put(wanted) {
            Ok(()) => return (Mapped::Vm, 0),
            Err(error) => code = error.raw_os_error().unwrap_or(libc::EIO),
        }
    }
    // Without privileges, groups must stay as they are (user_namespaces(7)).
    let _ = write("setgroups", "deny");
    match put(supervisor) {
        Ok(()) => (Mapped::Own, code),
        Err(error) => (Mapped::Nobody, error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// What the VMM does first: it binds its life to the supervisor's, and waits until it is mapped.
fn begin(lifeline: &mut File) -> io::Result<Mapping> {
    credentials::die_with_parent()?;
    let [mapped, error @ ..] = hear_parent(lifeline)?;
    let mapped = match mapped {
        mapped if mapped == Mapped::Vm as u8 => Mapped::Vm,
        mapped if mapped == Mapped::Own as u8 => Mapped::Own,
        _ => Mapped::Nobody,
    };
    Ok((mapped, i32::from_le_bytes(error)))
}

/// What the supervisor says first. One that has ended before this process was bound to its
/// life is an error, also if it said it before: nobody else would end this process.
fn hear_parent(lifeline: &mut File) -> io::Result<[u8; 5]> {
    let mut told = [0; 5];
    lifeline.read_exact(&mut told)?;
    check(lifeline)?;
    Ok(told)
}

impl Child {
    /// Readable when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Its number, as the supervisor sees it.
    pub fn id(&self) -> u32 {
        self.pid.cast_unsigned()
    }

    /// Ends it at once.
    pub fn kill(&self) -> io::Result<()> {
        if self.status.is_some() {
            return Ok(());
        }
        // SAFETY: numbers; it was not waited for, so nobody else has its number.
        match unsafe { libc::kill(self.pid, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        match self.status {
            Some(status) => Ok(status),
            None => {
                let status = wait(self.pid, 0)?.ok_or(io::ErrorKind::NotFound)?;
                Ok(*self.status.insert(status))
            }
        }
    }

    /// The exit status, if it has ended.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = wait(self.pid, libc::WNOHANG)?;
        }
        Ok(self.status)
    }
}

#[cfg(any(test, feature = "testing"))]
impl Child {
    /// A program in the VMM's place, without namespaces.
    pub fn stand_in(command: &mut std::process::Command) -> io::Result<Self> {
        let pid = command.spawn()?.id().cast_signed();
        // SAFETY: makes a new descriptor of a number; nobody else waits for the process.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let pidfd = i32::try_from(pidfd).map_err(io::Error::other)?;
        if pidfd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Child {
            pid,
            // SAFETY: it is new, and nothing else owns it.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
            _lifeline: pipe()?.1,
            status: None,
        })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.status.is_none() && self.kill().is_ok() {
            // One that waits for I/O of the host's may not end for long: init has it then.
            let mut ended = libc::pollfd {
                fd: self.pidfd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one live entry.
            unsafe { libc::poll(&mut ended, 1, KILL_TIMEOUT_MS) };
            let _ = self.try_wait();
        }
    }
}

/// Waits for a child's end; `None` if it has not, and one does not want to wait.
pub fn wait(pid: libc::pid_t, options: libc::c_int) -> io::Result<Option<ExitStatus>> {
    loop {
        let mut status = 0;
        // SAFETY: fills in a live number.
        match unsafe { libc::waitpid(pid, &mut status, options) } {
            0 => return Ok(None),
            1.. => return Ok(Some(ExitStatus::from_raw(status))),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

fn pipe() -> io::Result<(File, File)> {
    let (reader, writer) = io::pipe()?;
    Ok((OwnedFd::from(reader).into(), OwnedFd::from(writer).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_that_ended_is_noticed_whatever_it_said_before() {
        for (said, lives) in [(&b""[..], false), (b"12345", false), (b"12345", true)] {
            let (mut ours, mut theirs) = pipe().unwrap();
            theirs.write_all(said).unwrap();
            let theirs = lives.then_some(theirs);
            let heard = hear_parent(&mut ours);
            assert_eq!(heard.is_ok(), lives, "{said:?} {heard:?}");
            drop(theirs);
        }
    }
}
