//! What a guest that took over its VMM process could read there: nothing of the user's.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::process::{Child, Command};

use mayfly_testing::processes::{children, name};
use mayfly_testing::user::{NOBODY, User};
use mayfly_testing::{eventually, mayfly};

/// In the environment, in an argument, and in a path of the user's.
const PLANTED: [&str; 3] = ["planted-in-environment", "planted-argument", "planted-path"];
/// Larger mappings are the guest's memory, of which this one writes nothing.
const LARGEST: u64 = 24 << 20;

struct Vm(Child);

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The mappings of a process: where they are, and which may be read.
fn mappings(pid: u32) -> Vec<(u64, u64, bool)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let parse = |line: &str| {
        let mut words = line.split(' ');
        let (start, end) = words.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let readable = words.next()?.starts_with('r');
        Some((number(start)?, number(end)?, readable))
    };
    maps.lines().map(|line| parse(line).unwrap()).collect()
}

/// Whether a process has some bytes in its memory.
fn has_in_memory(pid: u32, sought: &[u8]) -> bool {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mappings = mappings(pid).into_iter();
    let mut readable = mappings.filter(|(start, end, readable)| *readable && end - start < LARGEST);
    readable.any(|(start, end, _)| {
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        match memory.read_exact_at(&mut bytes, start) {
            // The kernel's own, such as [vvar].
            Err(error) if error.kind() != ErrorKind::UnexpectedEof => false,
            read => {
                read.unwrap();
                bytes.windows(sought.len()).any(|window| window == sought)
            }
        }
    })
}

#[test]
fn a_vmm_process_has_nothing_of_the_user_s() {
    let [environment, argument, path] = PLANTED;
    let mut user = User::tiny();
    user.set("SOME_TOKEN", environment);
    let folder = user.path(path);
    fs::create_dir(&folder).unwrap();
    let (kernel, disk) = (folder.join("kernel"), folder.join("disk"));
    fs::copy(user.path("halts"), &kernel).unwrap();
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let (disk, vsock) = (
        format!("path={}", disk.display()),
        format!("cid=3,unix={}", folder.join("vsock").display()),
    );
    let name_flag = format!("--name={argument}");
    let words = [
        "boot",
        "--kernel",
        kernel.to_str().unwrap(),
        "--console",
        "none",
        "--disk",
        &disk,
        "--vsock",
        &vsock,
        "--memory",
        "32M",
        &name_flag,
    ];
    let supervisor = Vm(user.mayfly(&words).spawn().unwrap());
    eventually("its guest does not run", || {
        let info = user.output(&["ctl", argument, "info"]);
        info.status.success().then_some(())
    });
    let pid = supervisor.0.id();
    let vmm = children(pid)
        .into_iter()
        .find(|pid| name(*pid) == "mayfly-vmm")
        .unwrap();

    let read = |name: &str| fs::read(format!("/proc/{vmm}/{name}")).unwrap();
    assert_eq!(read("environ"), b"");
    assert_eq!(read("cmdline"), b"mayfly-vmm\0");
    // What is looked for can be found: the supervisor has it all.
    for planted in PLANTED {
        assert!(has_in_memory(pid, planted.as_bytes()), "{planted}");
        assert!(!has_in_memory(vmm, planted.as_bytes()), "{planted}");
    }
    // What is where in the supervisor it does not know.
    let all =
        [mappings(pid), mappings(vmm)].map(|all| all.iter().map(|it| it.0).collect::<Vec<_>>());
    let [theirs, its] = all;
    let vsyscall = |start: &&u64| **start > u64::MAX >> 1;
    let same = its
        .iter()
        .filter(|start| theirs.contains(start) && !vsyscall(start));
    assert_eq!(same.count(), 0);
    // None of its descriptors is a directory, or a file that it was not given.
    for fd in fs::read_dir(format!("/proc/{vmm}/fd")).unwrap() {
        let to = fs::read_link(fd.unwrap().path()).unwrap();
        let text = to.to_str().unwrap();
        let given = text.contains(':') || text.starts_with("/dev/") || to.ends_with("disk");
        let kernel = to.ends_with("kernel");
        assert!(given || kernel, "{text}");
    }
}

/// Root may run what only another user may execute; in the VMM's namespaces it may not.
#[test]
fn a_program_of_another_user_s_becomes_a_vmm() {
    let user = User::tiny();
    let program = user.path("mayfly");
    fs::copy(mayfly(), &program).unwrap();
    fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
    chown(&program, Some(NOBODY), Some(NOBODY)).unwrap();
    let kernel = user.path("turns-off");
    let words = [
        "boot",
        "--kernel",
        kernel.to_str().unwrap(),
        "--console",
        "none",
    ];
    let mut command = user.mayfly(&words);
    let mut own = Command::new(&program);
    own.args(words).envs(
        command
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    let ended = own.output().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    // As the other, of whom all else holds.
    assert_eq!(command.output().unwrap().status.code(), Some(0));
}
