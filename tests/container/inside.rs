//! This program in a container: it tries what Docker's filter refuses, and what it allows.

use std::io;
use std::process::ExitCode;

/// What it is called with there.
pub const WORD: &str = "--inside";

/// The call's error, or 0.
type Try = fn() -> libc::c_long;

const fn number(text: &std::ffi::CStr) -> *const libc::c_char {
    text.as_ptr()
}

macro_rules! call {
    ($($argument:expr),+) => {
        // SAFETY: what it is given is live, or nothing; most are refused.
        (|| unsafe { libc::syscall($($argument),+) }) as Try
    };
}

/// A program of no instructions, a policy of none: what is not valid is told only by a
/// kernel that was reached.
const NONE: usize = 0;

const TRIES: [(&str, Try, i32); 26] = [
    (
        "mount",
        call!(
            libc::SYS_mount,
            number(c"x"),
            number(c"/"),
            number(c"tmpfs"),
            NONE,
            NONE
        ),
        libc::EPERM,
    ),
    (
        "umount2",
        call!(libc::SYS_umount2, number(c"/proc"), NONE),
        libc::EPERM,
    ),
    (
        "pivot_root",
        call!(libc::SYS_pivot_root, number(c"/"), number(c"/")),
        libc::EPERM,
    ),
    (
        "fsopen",
        call!(libc::SYS_fsopen, number(c"tmpfs"), NONE),
        libc::EPERM,
    ),
    (
        "open_tree",
        call!(libc::SYS_open_tree, libc::AT_FDCWD, number(c"/"), NONE),
        libc::EPERM,
    ),
    (
        "unshare user",
        call!(libc::SYS_unshare, libc::CLONE_NEWUSER),
        libc::EPERM,
    ),
    (
        "unshare nothing",
        call!(libc::SYS_unshare, NONE),
        libc::EPERM,
    ),
    ("setns", call!(libc::SYS_setns, -1, NONE), libc::EPERM),
    (
        "clone user",
        call!(
            libc::SYS_clone,
            libc::CLONE_NEWUSER | libc::SIGCHLD,
            NONE,
            NONE,
            NONE,
            NONE
        ),
        libc::EPERM,
    ),
    ("clone3", call!(libc::SYS_clone3, NONE, NONE), libc::ENOSYS),
    (
        "keyctl",
        call!(libc::SYS_keyctl, NONE, NONE, NONE),
        libc::EPERM,
    ),
    (
        "add_key",
        call!(libc::SYS_add_key, NONE, NONE, NONE, NONE, NONE),
        libc::EPERM,
    ),
    (
        "request_key",
        call!(libc::SYS_request_key, NONE, NONE, NONE, NONE),
        libc::EPERM,
    ),
    ("bpf", call!(libc::SYS_bpf, NONE, NONE, NONE), libc::EPERM),
    (
        "perf_event_open",
        call!(libc::SYS_perf_event_open, NONE, NONE, NONE, NONE, NONE),
        libc::EPERM,
    ),
    (
        "userfaultfd",
        call!(libc::SYS_userfaultfd, NONE),
        libc::EPERM,
    ),
    (
        "io_uring_setup",
        call!(libc::SYS_io_uring_setup, 1, NONE),
        libc::EPERM,
    ),
    (
        "kexec_load",
        call!(libc::SYS_kexec_load, NONE, NONE, NONE, NONE),
        libc::EPERM,
    ),
    (
        "init_module",
        call!(libc::SYS_init_module, NONE, NONE, NONE),
        libc::EPERM,
    ),
    (
        "settimeofday",
        call!(libc::SYS_settimeofday, NONE, NONE),
        libc::EPERM,
    ),
    (
        "personality, strange",
        call!(libc::SYS_personality, 0x0040_0000),
        libc::EPERM,
    ),
    (
        "socket of AF_VSOCK",
        call!(libc::SYS_socket, libc::AF_VSOCK, libc::SOCK_STREAM, 0),
        libc::EPERM,
    ),
    (
        "socket of AF_ALG",
        call!(libc::SYS_socket, libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
        libc::EPERM,
    ),
    // What is allowed.
    (
        "personality, asked",
        call!(libc::SYS_personality, u32::MAX),
        0,
    ),
    (
        "socket of AF_INET",
        call!(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
        0,
    ),
    ("chroot", call!(libc::SYS_chroot, number(c"/")), 0),
];

pub fn main() -> ExitCode {
    let mut wrong = false;
    for (name, call, expected) in TRIES {
        let errno = match call() {
            -1 => io::Error::last_os_error().raw_os_error().unwrap_or(0),
            _ => 0,
        };
        println!("{name}: {errno}");
        if errno != expected {
            eprintln!("{name}: {errno}, not {expected}");
            wrong = true;
        }
    }
    // Threads start, though the newest call for that is not there.
    let thread = std::thread::Builder::new().spawn(|| ());
    wrong |= thread.is_err();
    ExitCode::from(u8::from(wrong))
}
