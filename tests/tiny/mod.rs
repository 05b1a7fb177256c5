//! Guests of a few instructions, which any KVM runs, and a user who starts them: for what
//! a host does with many VMs, or with one that ends at any moment.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use mayfly_boot::initramfs::Initramfs;
use tempfile::TempDir;

/// What is waited for comes by then, or never.
pub const TIMEOUT: Duration = Duration::from_secs(120);

/// What a tiny guest does.
#[derive(Clone, Copy, Debug)]
pub enum Does {
    /// It halts its CPU for ever.
    Halt,
    /// It turns its VM off.
    PowerOff,
}

/// A kernel for it: an ELF file with one segment.
pub fn kernel(does: Does) -> Vec<u8> {
    const AT: u64 = 2 << 20;
    const HEADER: u16 = 64;
    const PROGRAM_HEADER: u16 = 56;
    const CODE: u64 = 4096;
    let code: &[u8] = match does {
        // cli; 1: hlt; jmp 1b
        Does::Halt => &[0xfa, 0xf4, 0xeb, 0xfd],
        // mov dx, 0xb00 (ACPI's sleep control register); mov al, 0x34 (S5, now);
        // out dx, al; 1: hlt; jmp 1b
        Does::PowerOff => &[0x66, 0xba, 0x00, 0x0b, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd],
    };
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    for half in [2u16, 62] {
        put(&half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    put(&1u32.to_le_bytes());
    for long in [AT, u64::from(HEADER), 0] {
        put(&long.to_le_bytes()); // the entry, where program headers are, no sections
    }
    put(&0u32.to_le_bytes());
    for half in [HEADER, PROGRAM_HEADER, 1, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    for word in [1u32, 5] {
        put(&word.to_le_bytes()); // PT_LOAD, to be read and executed
    }
    let len = code.len() as u64;
    for long in [CODE, AT, AT, len, len, CODE] {
        put(&long.to_le_bytes());
    }
    elf.resize(CODE as usize, 0);
    elf.extend_from_slice(code);
    elf
}

/// A user with an image, a kernel that halts, one that turns its VM off, and no VMs.
pub struct User {
    pub home: TempDir,
}

impl User {
    pub fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let user = User { home };
        fs::write(user.path("halts"), kernel(Does::Halt)).unwrap();
        fs::write(user.path("turns-off"), kernel(Does::PowerOff)).unwrap();
        // A tiny guest has no use for initial RAM disks.
        let guest = user.path("cache/default");
        fs::create_dir_all(&guest).unwrap();
        fs::write(guest.join("vmlinux"), kernel(Does::Halt)).unwrap();
        for name in ["run.cpio", "initramfs.cpio"] {
            let empty = Initramfs::new(Vec::new()).unwrap().finish().unwrap();
            fs::write(guest.join(name), empty).unwrap();
        }
        fs::create_dir(user.path("root")).unwrap();
        fs::write(user.path("root/file"), "x").unwrap();
        let root = user.path("root");
        user.text(&["image", "import", root.to_str().unwrap(), "tiny"]);
        user
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// A command of the binary under test, whose output is for the caller.
    pub fn mayfly(&self, words: &[&str]) -> Command {
        let binary = std::env::var_os("MAYFLY_BIN").map(PathBuf::from);
        let mut command =
            Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_mayfly").into()));
        command
            .args(words)
            .env("XDG_DATA_HOME", self.path("share"))
            .env("MAYFLY_CACHE", self.path("cache"))
            .env("MAYFLY_RUNTIME_DIR", self.path("run"))
            // What emulates Linux too slowly is fast enough for a few instructions.
            .env("MAYFLY_ACCEPT_KVM", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn output(&self, words: &[&str]) -> Output {
        self.mayfly(words).output().unwrap()
    }

    /// Runs something that succeeds, and returns what it printed.
    pub fn text(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What `ps` knows of a VM.
    pub fn vm(&self, name: &str) -> Option<serde_json::Value> {
        let all = self.text(&["ps", "--all", "--json"]);
        let all: Vec<serde_json::Value> = serde_json::from_str(&all).unwrap();
        all.into_iter().find(|vm| vm["name"] == name)
    }
}

/// What a process's program is called.
pub fn name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

/// Whether a process runs; one that nobody waits for does not.
pub fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z"))
}

pub fn kill(pid: u32, signal: i32) {
    // SAFETY: touches no memory.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

/// Waits until something is so.
pub fn eventually<T>(what: &str, mut get: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(got) = get() {
            return got;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
