//! System calls by role. `resources/seccomp` has the lists, and why each call is in its
//! list; this crate's `build.rs` compiles them.

#![allow(unsafe_code, reason = "filters, and the handler of what they refuse")]

use std::cell::Cell;
use std::fmt::Write;
use std::io;
use std::mem::MaybeUninit;

use super::role::Role;
use super::status::{PANIC, VIOLATION};
use super::syscalls;

/// One instruction of a filter (`struct sock_filter`).
const INSTRUCTION: usize = size_of::<libc::sock_filter>();
/// A thread's name is shorter (`TASK_COMM_LEN`).
const NAME: usize = 16;
/// `SYS_SECCOMP`: why the signal came.
const SYS_SECCOMP: libc::c_int = 1;

const EVENT_LOOP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/event-loop.bpf"));
const VCPU: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vcpu.bpf"));
const SAVING_EVENT_LOOP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/saving-event-loop.bpf"));
const SAVING_VCPU: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/saving-vcpu.bpf"));
const IO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/io.bpf"));

/// How many system calls the thread that has most of them may make.
pub fn calls_max() -> Option<u32> {
    include_str!(concat!(env!("OUT_DIR"), "/system_calls_max"))
        .parse()
        .ok()
}

thread_local! {
    /// Who this thread is, for the handler: it may not ask for it any more.
    static SELF: Cell<Option<(Role, [u8; NAME])>> = const { Cell::new(None) };
}

/// Whether the kernel can filter, and tell the thread.
pub fn available() -> io::Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    let what = libc::SECCOMP_GET_ACTION_AVAIL;
    // SAFETY: reads a live number.
    match unsafe { libc::syscall(libc::SYS_seccomp, what, 0usize, &raw const action) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Confines the calling thread to a role's system calls.
pub fn confine(role: Role) -> io::Result<()> {
    let mut name = [0; NAME];
    // SAFETY: fills in a buffer of the size that the call has.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    SELF.set(Some((role, name)));
    let bytes = match role {
        Role::EventLoop => EVENT_LOOP,
        Role::Vcpu => VCPU,
        Role::SavingEventLoop => SAVING_EVENT_LOOP,
        Role::SavingVcpu => SAVING_VCPU,
        Role::Io => IO,
    };
    install(bytes)
}

/// Filters the calling thread's system calls from here on, by a compiled list. Without
/// CAP_SYS_ADMIN, or a promise of no new privileges, the kernel refuses.
pub fn install(bytes: &[u8]) -> io::Result<()> {
    Filter::compiled(bytes).install()
}

/// A filter that can be installed where nothing may be allocated.
pub struct Filter(Vec<libc::sock_filter>);

impl Filter {
    /// One that `build.rs` compiled.
    pub fn compiled(bytes: &[u8]) -> Self {
        let instructions =
            bytes
                .as_chunks::<INSTRUCTION>()
                .0
                .iter()
                .map(|&[a, b, jt, jf, k @ ..]| libc::sock_filter {
                    code: u16::from_ne_bytes([a, b]),
                    jt,
                    jf,
                    k: u32::from_ne_bytes(k),
                });
        Filter(instructions.collect())
    }

    /// See [`install`].
    pub fn install(&self) -> io::Result<()> {
        let too_long = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let program = libc::sock_fprog {
            len: u16::try_from(self.0.len()).map_err(too_long)?,
            filter: self.0.as_ptr().cast_mut(),
        };
        let mode = libc::SECCOMP_MODE_FILTER;
        // SAFETY: the kernel copies the program, which is live, and does not write to it.
        match unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Has a forbidden system call told in one line, and the process ended.
///
/// The call is not made, whatever happens here. The kernel kills the process where a
/// thread has the signal blocked, or where it has no handler; and no role may change a
/// signal's action, so this one stays. It is as strong as having the kernel kill the
/// process each time, but for a guest that already runs code on another thread, and may
/// keep this one from its end: it gains nothing by that.
pub fn install_handler() -> io::Result<()> {
    // SAFETY: all zeroes are a value of it.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_violation as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler keeps to what is allowed in one.
    if unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills in the set, and adds to it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGSYS);
    }
    // SAFETY: the set was filled in.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// What `siginfo_t` is for this signal.
#[repr(C)]
struct Violation {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    _pad: libc::c_int,
    address: *const libc::c_void,
    number: libc::c_int,
    architecture: libc::c_uint,
}

extern "C" fn on_violation(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives what is live, and at least as large.
    let info = unsafe { &*info.cast::<Violation>() };
    if info.code != SYS_SECCOMP {
        return;
    }
    let mut line = Line::default();
    let status = line.describe(SELF.get(), info.number);
    // SAFETY: the line's bytes. Every role may do both.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.text.as_ptr().cast(), line.len);
        libc::_exit(status.into());
    }
}

/// A line on the stack, as nothing may be allocated. What does not fit is dropped.
struct Line {
    text: [u8; 200],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line {
            text: [0; 200],
            len: 0,
        }
    }
}

impl Line {
    /// Returns the exit status.
    fn describe(&mut self, thread: Option<(Role, [u8; NAME])>, number: libc::c_int) -> u8 {
        let (role, name) = match &thread {
            Some((role, name)) => (role.name(), name.as_slice()),
            None => ("none", [].as_slice()),
        };
        let end = name.iter().position(|&byte| byte == 0);
        let name = name.get(..end.unwrap_or(name.len())).unwrap_or_default();
        let name = std::str::from_utf8(name).unwrap_or("?");
        let number = libc::c_long::from(number);
        if number == libc::SYS_gettid {
            // So begins glibc's `abort`, which nothing but a broken heap, or one that is
            // out of memory, calls.
            let _ = writeln!(self, "mayfly: thread \"{name}\" aborts");
            return PANIC;
        }
        let call = syscalls::name(number).unwrap_or("unknown");
        let _ = writeln!(
            self,
            "mayfly: sandbox: thread \"{name}\" (role {role}) made the forbidden system call \
             {number} ({call}); the VM ends"
        );
        VIOLATION
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = self.text.get_mut(self.len..).unwrap_or_default();
        let fits = room.len().min(text.len());
        for (to, from) in room.iter_mut().zip(text.as_bytes()) {
            *to = *from;
        }
        self.len += fits;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    fn list(role: Role) -> Vec<Value> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp");
        let text = fs::read(directory.join(format!("{}.json", role.name()))).unwrap();
        let file: Value = serde_json::from_slice(&text).unwrap();
        let filter = &file[role.name()];
        assert_eq!(filter["mismatch_action"], "trap");
        filter["filter"].as_array().unwrap().clone()
    }

    #[test]
    fn the_lists_are_short_and_give_reasons() {
        let most = [
            (Role::Vcpu, 20),
            (Role::EventLoop, 40),
            // Beside those of the same thread of other VMs.
            (Role::SavingVcpu, 2),
            (Role::SavingEventLoop, 4),
            (Role::Io, 40),
        ];
        for (role, most) in most {
            let list = list(role);
            for entry in &list {
                assert!(entry["comment"].as_str().unwrap().len() > 3, "{entry}");
            }
            let names: BTreeSet<_> = list.iter().map(|entry| entry["syscall"].as_str()).collect();
            assert!(names.len() <= most, "{role:?}: {}", names.len());
            // What would open the way to all others.
            for name in [
                "rt_sigaction",
                "clone",
                "clone3",
                "execve",
                "prctl",
                "openat",
            ] {
                assert!(!names.contains(&Some(name)), "{role:?}: {name}");
            }
        }
    }

    #[test]
    fn arguments_are_checked_where_they_matter() {
        for role in Role::ALL {
            for entry in list(role) {
                let name = entry["syscall"].as_str().unwrap();
                let checked = [
                    "ioctl",
                    "mmap",
                    "mprotect",
                    "fcntl",
                    "madvise",
                    "tgkill",
                    "fallocate",
                ];
                let has = entry["args"]
                    .as_array()
                    .is_some_and(|args| !args.is_empty());
                assert!(has || !checked.contains(&name), "{role:?}: {entry}");
            }
        }
    }

    #[test]
    fn a_violation_is_one_line() {
        let mut name = [0; NAME];
        name[..5].copy_from_slice(b"vcpu0");
        let mut line = Line::default();
        assert_eq!(line.describe(Some((Role::Vcpu, name)), 59), VIOLATION);
        assert_eq!(
            std::str::from_utf8(&line.text[..line.len]).unwrap(),
            "mayfly: sandbox: thread \"vcpu0\" (role vcpu) made the forbidden system call 59 \
             (execve); the VM ends\n"
        );
    }
}
