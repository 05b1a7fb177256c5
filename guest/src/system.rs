//! What only PID 1 does: mounts, modules, processes, power.

#![allow(unsafe_code, reason = "what init asks of the kernel")]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Source, target, type, data of each mount.
pub const MOUNTS: [(&str, &str, &str, &str); 6] = [
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
    ("devtmpfs", "/dev", "devtmpfs", "mode=755"),
    (
        "devpts",
        "/dev/pts",
        "devpts",
        "gid=5,mode=620,ptmxmode=666",
    ),
    ("tmpfs", "/run", "tmpfs", "mode=755"),
    ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
];
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
const DRAIN_NAP: Duration = Duration::from_millis(1);
const STATUS_NOT_EXECUTABLE: i32 = 126;
const STATUS_NOT_FOUND: i32 = 127;
const STATUS_SIGNAL: i32 = 128;

/// Reads a text file.
pub fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

/// The names in a directory, in order.
pub fn names(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Mounts the kernel's file systems.
pub fn mount_all() -> Result<(), String> {
    for (source, target, kind, data) in MOUNTS {
        fs::create_dir_all(target).map_err(|error| format!("{target}: {error}"))?;
        mount(source, target, kind, libc::MS_NOSUID, data).or_else(|error| {
            // The kernel itself may have mounted /dev.
            match error.raw_os_error() {
                Some(libc::EBUSY) => Ok(()),
                _ => Err(format!("mounting {target}: {error}")),
            }
        })?;
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        let _ = std::os::unix::fs::symlink(target, link);
    }
    Ok(())
}

/// Mounts, or moves what is mounted.
pub fn mount(
    source: impl AsRef<[u8]>,
    target: impl AsRef<[u8]>,
    kind: &str,
    flags: libc::c_ulong,
    data: &str,
) -> io::Result<()> {
    let texts = [
        source.as_ref(),
        target.as_ref(),
        kind.as_bytes(),
        data.as_bytes(),
    ];
    let [source, target, kind, data] = texts.map(CString::new);
    let (source, target, kind, data) = (source?, target?, kind?, data?);
    // SAFETY: four strings that live until the call returns.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    };
    check(result.into())
}

/// Loads the modules in a list of paths, in its order. Those that are for
/// devices which are not there are left out: each costs time.
pub fn load_modules(list: &Path) -> Result<(), String> {
    let list = fs::read_to_string(list).unwrap_or_default(); // none: all is built in
    for line in list.lines() {
        if let Some(path) = wanted(line) {
            load_module(path, fs::File::open(path))?;
        }
    }
    Ok(())
}

/// Modules that can be loaded when their files are gone.
pub struct OpenModules(Vec<(String, io::Result<fs::File>)>);

impl OpenModules {
    /// Opens those in a list.
    pub fn open(list: &Path) -> Self {
        let list = fs::read_to_string(list).unwrap_or_default();
        let wanted = list.lines().filter_map(wanted);
        OpenModules(
            wanted
                .map(|path| (path.to_owned(), fs::File::open(path)))
                .collect(),
        )
    }

    /// Loads them.
    pub fn load(self) -> Result<(), String> {
        let mut modules = self.0.into_iter();
        modules.try_for_each(|(path, file)| load_module(&path, file))
    }
}

/// The path in a line of a list, if it is to be loaded.
fn wanted(line: &str) -> Option<&str> {
    let mut words = line.split(' ');
    let path = words.next()?;
    let devices: Vec<&str> = words.collect();
    (devices.is_empty() || any_is_there(&devices)).then_some(path)
}

/// The name of a device begins with one of these.
fn any_is_there(devices: &[&str]) -> bool {
    let entries = fs::read_dir(VIRTIO_DEVICES).into_iter().flatten().flatten();
    let mut names = entries.filter_map(|entry| {
        let path = entry.path().join("modalias");
        fs::read_to_string(path).ok()
    });
    names.any(|name| devices.iter().any(|device| name.starts_with(device)))
}

fn load_module(path: &str, file: io::Result<fs::File>) -> Result<(), String> {
    let load = |file: fs::File| {
        // SAFETY: a descriptor that is open and an empty string.
        check(unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) })
    };
    match file.and_then(load) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => {
            Err(format!("loading {path}: {error}"))
        }
        _ => Ok(()),
    }
}

/// Lets the guest's work have the CPU before this thread.
pub fn give_way() {
    const NICE: libc::c_int = 10;
    // SAFETY: touches no memory; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

/// The error of a system call that failed.
pub fn check(result: libc::c_long) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs a command to its end, and returns its status as a shell would.
pub fn status_of(command: &mut Command) -> i32 {
    let spawned = command
        .env("PATH", PATH)
        .env("HOME", "/root")
        .spawn()
        .map(|child| child.id() as libc::pid_t);
    match spawned {
        Ok(pid) => wait_for(pid),
        Err(error) => {
            eprintln!("mayfly-init: {:?}: {error}", command.get_program());
            match error.kind() {
                io::ErrorKind::NotFound => STATUS_NOT_FOUND,
                _ => STATUS_NOT_EXECUTABLE,
            }
        }
    }
}

/// Waits for one process, and takes in all others that end meanwhile.
fn wait_for(pid: libc::pid_t) -> i32 {
    loop {
        let mut raw = 0;
        // SAFETY: the status is written to a live integer.
        let ended = unsafe { libc::waitpid(-1, &mut raw, 0) };
        if ended == pid {
            let status = ExitStatus::from_raw(raw);
            return status
                .code()
                .unwrap_or_else(|| STATUS_SIGNAL + status.signal().unwrap_or(0));
        }
        if ended < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return STATUS_NOT_EXECUTABLE;
        }
    }
}

/// Runs a shell with the console as its controlling terminal, so that Ctrl-C
/// and job control work: `/dev/console` itself can't be one.
pub fn interactive(shell: &str) -> i32 {
    let console = read("/sys/class/tty/console/active").unwrap_or_default();
    let name = console.split_whitespace().last().unwrap_or("ttyS0");
    INTERACTIVE.store(true, Ordering::SeqCst);
    let mut command = Command::new(shell);
    command.arg("-l").current_dir("/root");
    let open = || {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/dev/{name}"))
    };
    if let (Ok(input), Ok(output), Ok(errors)) = (open(), open(), open()) {
        command
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(errors));
        // SAFETY: only system calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
    }
    status_of(&mut command)
}

/// The power button was pressed.
static SHUTTING_DOWN: AtomicBool = AtomicBool::new(false);
/// There is a shell on the console.
static INTERACTIVE: AtomicBool = AtomicBool::new(false);

/// Tells all processes to end, and turns the machine off: at once when they
/// have, else after their time. PID 1's other thread waits for them.
pub fn shut_down() -> ! {
    const GRACE_PERIOD: Duration = Duration::from_secs(5);
    SHUTTING_DOWN.store(true, Ordering::SeqCst);
    signal_all(libc::SIGTERM);
    if INTERACTIVE.load(Ordering::SeqCst) {
        signal_all(libc::SIGHUP); // such a shell heeds nothing else
    }
    signal_all(libc::SIGCONT); // those that are stopped heed nothing before
    thread::sleep(GRACE_PERIOD);
    signal_all(libc::SIGKILL);
    thread::sleep(Duration::from_secs(1));
    end(libc::RB_POWER_OFF)
}

/// Signals all processes but this one.
fn signal_all(signal: libc::c_int) {
    // SAFETY: touches no memory.
    unsafe { libc::kill(-1, signal) };
}

/// Writes what is in memory to the disks and turns the machine off.
pub fn power_off() -> ! {
    if SHUTTING_DOWN.load(Ordering::SeqCst) {
        // SAFETY: no status is asked for.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {}
    }
    end(libc::RB_POWER_OFF)
}

/// Waits until the terminal's driver has passed on what was written, as the VM's end
/// does not; but not for one whom nobody reads.
fn drain_console() {
    let deadline = Instant::now() + DRAIN_TIMEOUT;
    loop {
        let mut left: libc::c_int = 0;
        // SAFETY: writes a number to a live one; a descriptor that is no terminal is refused.
        let asked = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCOUTQ, &raw mut left) };
        if asked != 0 || left == 0 || Instant::now() > deadline {
            return;
        }
        thread::sleep(DRAIN_NAP);
    }
}

/// Writes what is in memory to the disks and restarts the machine.
pub fn restart() -> ! {
    end(libc::RB_AUTOBOOT)
}

fn end(how: libc::c_int) -> ! {
    drain_console();
    // SAFETY: no arguments, no memory.
    unsafe { libc::sync() };
    loop {
        // SAFETY: does not return when it succeeds; touches no memory of ours.
        unsafe { libc::reboot(how) };
        thread::sleep(Duration::from_secs(1));
    }
}
