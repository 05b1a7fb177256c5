//! What can be seen of the host from where the command runs.

#![allow(unsafe_code, reason = "seccomp has no other interface")]

use std::fs;
use std::mem::{offset_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use mayfly_protocol::facts::Facts;

/// System calls have numbers up to here (6.12 ends at 462).
const SYSCALLS: u32 = 470;
/// No numbers, or none that filters see (`uretprobe`, `uprobe`): between the first table
/// and what all architectures share.
const UNUSED: std::ops::RangeInclusive<u32> = 335..=423;
/// The last argument of a system call that is only tried.
const MAGIC: u32 = 0x6d61_7966;
/// What a call that was let through returns.
const REACHED: i32 = 3999;

/// Collects what isolation leaves visible, and returns it as a JSON object.
pub fn collect() -> String {
    let status = read("/proc/self/status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    let facts = Facts {
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        boot_id: boot_id(),
        namespaces: namespaces(),
        capabilities: u64::from_str_radix(&field("CapEff:"), 16).unwrap_or(0),
        seccomp: field("Seccomp:").parse().unwrap_or(0),
        devices: devices(),
        memory_kib: read("/proc/meminfo")
            .split_whitespace()
            .nth(1)
            .and_then(|number| number.parse().ok())
            .unwrap_or(0),
        cpus: count(read("/proc/cpuinfo").lines(), |line| {
            line.starts_with("processor")
        }),
        command_line: read("/proc/cmdline").trim().to_owned(),
        modules: count(read("/proc/modules").lines(), |_| true),
        processes: count(names("/proc").iter(), |name| {
            name.bytes().all(|byte| byte.is_ascii_digit())
        }),
        syscalls: syscalls(),
    };
    serde_json::to_string(&facts).unwrap_or_default()
}

fn count<T>(items: impl Iterator<Item = T>, wanted: impl Fn(&T) -> bool) -> u32 {
    u32::try_from(items.filter(wanted).count()).unwrap_or(u32::MAX)
}

fn read(path: &str) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

fn names(folder: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// As the kernel says it: some containers have a file of their own there.
fn boot_id() -> String {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    const PROC_SUPER_MAGIC: libc::c_long = libc::PROC_SUPER_MAGIC as libc::c_long;
    match rustix::fs::statfs(PATH) {
        Ok(system) if system.f_type == PROC_SUPER_MAGIC => read(PATH).trim().to_owned(),
        _ => String::new(),
    }
}

fn namespaces() -> Vec<(String, String)> {
    ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]
        .into_iter()
        .filter_map(|name| {
            let id = fs::read_link(format!("/proc/self/ns/{name}")).ok()?;
            Some((name.to_owned(), id.to_string_lossy().into_owned()))
        })
        .collect()
}

/// Device nodes, without terminals of the session and what is not a device.
fn devices() -> Vec<String> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = Vec::new();
    let mut folders = vec![String::from("/dev")];
    while let Some(folder) = folders.pop() {
        for name in names(&folder) {
            let path = format!("{folder}/{name}");
            match fs::symlink_metadata(&path).map(|it| it.file_type()) {
                Ok(kind) if kind.is_char_device() || kind.is_block_device() => found.push(path),
                Ok(kind) if kind.is_dir() && folders.len() < 100 => folders.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

/// Counts the system calls that no filter refuses, without making one of them: a filter of
/// our own, which ranks behind those that refuse, reports the others to another thread
/// (seccomp(2), `SECCOMP_RET_USER_NOTIF`). `None` if the kernel or a filter does not let it.
fn syscalls() -> Option<u32> {
    let (sender, receiver) = mpsc::channel();
    // The filter is of that thread alone, and ends with it.
    let trial = thread::spawn(move || {
        let listener = listen()?;
        sender.send(listener).ok()?;
        let tried = (0..SYSCALLS).filter(|number| !UNUSED.contains(number));
        Some(count(tried, |&number| reaches(number)))
    });
    let listener = receiver.recv().ok()?;
    // Until the filter's thread is gone.
    while answer(&listener) {}
    trial.join().ok()?
}

/// Tries a call, with a last argument that the filter takes for itself.
fn reaches(number: u32) -> bool {
    // SAFETY: the filter of this thread never lets a call with that argument through.
    let result = unsafe { libc::syscall(number.into(), 0, 0, 0, 0, 0, u64::from(MAGIC)) };
    result == -1 && std::io::Error::last_os_error().raw_os_error() == Some(REACHED)
}

fn listen() -> Option<OwnedFd> {
    const NEW_LISTENER: libc::c_ulong = 1 << 3;
    let statement = |code: u32, value| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k: value,
    };
    let last_argument = offset_of!(libc::seccomp_data, args) + 5 * size_of::<u64>();
    let mut program = [
        statement(
            libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
            last_argument as u32,
        ),
        libc::sock_filter {
            jf: 1,
            ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, MAGIC)
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: takes numbers only.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: a program that lives until the call returns.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            NEW_LISTENER,
            &program,
        )
    };
    let listener = i32::try_from(listener).ok().filter(|&it| it >= 0)?;
    // SAFETY: a new descriptor that nothing else owns.
    Some(unsafe { OwnedFd::from_raw_fd(listener) })
}

/// Answers one call that was let through; false when no more can come.
fn answer(listener: &OwnedFd) -> bool {
    let mut poll = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure that lives until the call returns.
    let ready = unsafe { libc::poll(&mut poll, 1, -1) };
    if ready < 0 || poll.revents & libc::POLLIN == 0 {
        return ready < 0;
    }
    // SAFETY: a plain C structure, for which zeroes are valid.
    let mut request: libc::seccomp_notif = unsafe { zeroed() };
    // SAFETY: the structure that the call fills.
    let taken = unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_RECV, &mut request) };
    if taken < 0 {
        return true;
    }
    let mut response = libc::seccomp_notif_resp {
        id: request.id,
        val: 0,
        error: -REACHED,
        flags: 0,
    };
    // SAFETY: the structure that the call reads.
    unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SEND, &mut response) };
    true
}

/// `SECCOMP_IOCTL_NOTIF_RECV`, `SECCOMP_IOCTL_NOTIF_SEND` of `linux/seccomp.h`.
const NOTIF_RECV: libc::Ioctl = request_code(0, size_of::<libc::seccomp_notif>());
const NOTIF_SEND: libc::Ioctl = request_code(1, size_of::<libc::seccomp_notif_resp>());

/// `_IOWR('!', number, size)`
const fn request_code(number: libc::Ioctl, size: usize) -> libc::Ioctl {
    const READ_WRITE: libc::Ioctl = 3 << 30;
    READ_WRITE | (size as libc::Ioctl) << 16 | (b'!' as libc::Ioctl) << 8 | number
}
