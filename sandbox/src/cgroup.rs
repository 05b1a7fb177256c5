//! The control group of a VM's processes, which are the VMM's and the helpers': how much of
//! the host they may have. Made by the supervisor, of version 2 where the host has that, else of version 1
//! (Linux' `admin-guide/cgroup-v2.rst` and `cgroup-v1/`).

#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::Access;

use super::layers::Status;

/// What a VM's groups are called, before its supervisor's process id.
const PREFIX: &str = "mayfly-";
/// The time that a quota is of, in microseconds.
const PERIOD_US: u64 = 100_000;
/// What the monitor itself may have: its program, its queues, page tables, stacks …
const OVERHEAD: u64 = 64 << 20;
/// … the tables of guest memory's pages, the host's and the guest's (8 bytes for 4096
/// each, and as much again to spare) …
const TABLES: u64 = 128;
/// … and each vCPU.
const OVERHEAD_PER_CPU: u64 = 4 << 20;
/// Threads beside the vCPUs: the event loop's, those of disks, the kernel's for
/// io_uring.
const THREADS: u64 = 128;
/// Of memory: what passt has for its connections, in its own memory and in sockets' …
const OVERHEAD_PER_NET: u64 = 96 << 20;
/// … and what the kernel has for each file that virtiofsd keeps open, which are those that
/// the guest knows: about 1.5 KiB.
const OVERHEAD_PER_DIRECTORY: u64 = 512 << 20;
/// Of either helper: virtiofsd has a pool of 64.
const THREADS_PER_HELPER: u64 = 80;

/// How often removing a group in use is tried, and the time between two tries.
const REMOVALS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// A controller, a file of it, and what it is to hold.
type Setting = (&'static str, &'static str, String);

/// The limits of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// vCPUs.
    pub cpus: u8,
    /// The guest's memory, and that of its disks which lie in memory; in bytes.
    pub memory: u64,
    /// Networks that a helper makes.
    pub nets: u64,
    /// Directories that a helper serves.
    pub directories: u64,
}

impl Share {
    /// Of memory: the guest's, and what the monitor and the helpers need beside it.
    pub fn memory_limit(&self) -> u64 {
        let own = OVERHEAD + OVERHEAD_PER_CPU * u64::from(self.cpus);
        let tables = self.memory / TABLES;
        let nets = OVERHEAD_PER_NET.saturating_mul(self.nets);
        let directories = OVERHEAD_PER_DIRECTORY.saturating_mul(self.directories);
        let parts = [own, tables, nets, directories].into_iter();
        parts.fold(self.memory, u64::saturating_add)
    }

    /// Of the CPUs in a [`PERIOD_US`]: as many as the guest believes to have.
    fn quota_us(&self) -> u64 {
        PERIOD_US * u64::from(self.cpus)
    }

    fn threads(&self) -> u64 {
        let helpers = self.nets.saturating_add(self.directories);
        let theirs = THREADS_PER_HELPER.saturating_mul(helpers);
        theirs.saturating_add(THREADS + u64::from(self.cpus))
    }

    /// Files of version 2.
    fn v2(&self) -> Vec<Setting> {
        vec![
            ("memory", "memory.max", self.memory_limit().to_string()),
            ("cpu", "cpu.max", format!("{} {PERIOD_US}", self.quota_us())),
            ("pids", "pids.max", self.threads().to_string()),
            ("io", "io.weight", "default 100".to_owned()),
            // A VM without its helpers is none: all of it ends, and the user hears why.
            ("memory", "memory.oom.group", "1".to_owned()),
        ]
    }

    /// Files of version 1.
    fn v1(&self) -> Vec<Setting> {
        let memory = self.memory_limit().to_string();
        let shares = 1024 * u64::from(self.cpus);
        vec![
            ("memory", "memory.limit_in_bytes", memory),
            ("cpu", "cpu.cfs_period_us", PERIOD_US.to_string()),
            ("cpu", "cpu.cfs_quota_us", self.quota_us().to_string()),
            ("cpu", "cpu.shares", shares.to_string()),
            ("pids", "pids.max", self.threads().to_string()),
            ("blkio", "blkio.weight", "500".to_owned()),
        ]
    }
}

/// What a container may have, each if it is limited at all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounds {
    /// CPUs.
    pub cpus: Option<f64>,
    /// Bytes of memory, and as many of swap: Docker's default.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

impl Bounds {
    fn quota_us(&self) -> Option<u64> {
        // A quota of less than a millisecond is refused.
        let seconds = |cpus| Duration::from_micros(PERIOD_US).as_secs_f64() * cpus;
        let quota = Duration::try_from_secs_f64(seconds(self.cpus?)).ok()?;
        u64::try_from(quota.as_micros())
            .ok()
            .map(|quota| quota.max(1000))
    }

    /// Files of version 2.
    fn v2(&self) -> Vec<Setting> {
        let memory = self.memory.map(|it| it.to_string());
        let quota = self.quota_us().map(|quota| format!("{quota} {PERIOD_US}"));
        let all = [
            ("memory", "memory.max", memory.clone()),
            ("memory", "memory.swap.max", memory),
            ("cpu", "cpu.max", quota),
            ("pids", "pids.max", self.pids.map(|it| it.to_string())),
        ];
        wanted(all)
    }

    /// Files of version 1.
    fn v1(&self) -> Vec<Setting> {
        let memory = self.memory.map(|it| it.to_string());
        let with_swap = self.memory.map(|it| it.saturating_mul(2).to_string());
        let period = self.cpus.map(|_| PERIOD_US.to_string());
        let all = [
            ("memory", "memory.limit_in_bytes", memory),
            ("memory", "memory.memsw.limit_in_bytes", with_swap),
            ("cpu", "cpu.cfs_period_us", period),
            (
                "cpu",
                "cpu.cfs_quota_us",
                self.quota_us().map(|it| it.to_string()),
            ),
            ("pids", "pids.max", self.pids.map(|it| it.to_string())),
        ];
        wanted(all)
    }
}

/// The settings that have a value.
fn wanted<const N: usize>(all: [(&'static str, &'static str, Option<String>); N]) -> Vec<Setting> {
    let set = all.into_iter();
    set.filter_map(|(controller, file, value)| Some((controller, file, value?)))
        .collect()
}

/// Those that a host should have; the weight of block I/O few have.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
/// Those that are turned on for groups below.
const TURNED_ON: [&str; 4] = ["memory", "cpu", "pids", "io"];

/// A machine's groups, removed with this.
#[derive(Debug)]
pub struct Cgroup {
    directories: Vec<PathBuf>,
    /// The one of version 2, if there are no others.
    only: Option<PathBuf>,
    limited: Vec<&'static str>,
    status: Status,
}

impl Cgroup {
    /// Makes groups with limits, as far as the host lets this user.
    pub fn make(share: &Share) -> Self {
        let name = format!("{PREFIX}{}", std::process::id());
        let files = (share.v2(), share.v1());
        Cgroup::make_in(&name, &files, &CONTROLLERS, &Hierarchies::find())
    }

    /// Makes a container's groups, with a name of its own if it has none.
    pub fn bounded(name: Option<&str>, bounds: &Bounds) -> Self {
        let files = (bounds.v2(), bounds.v1());
        let needed: Vec<_> = files.0.iter().map(|(controller, ..)| *controller).collect();
        let own = format!("{PREFIX}{}", std::process::id());
        let name = name.unwrap_or(&own);
        Cgroup::make_in(name, &files, &needed, &Hierarchies::find())
    }

    /// Makes groups with settings of versions 2 and 1; some controllers are needed.
    fn make_in(
        name: &str,
        (v2, v1): &(Vec<Setting>, Vec<Setting>),
        needed: &[&'static str],
        hierarchies: &Hierarchies,
    ) -> Self {
        let mut made = Cgroup {
            directories: Vec::new(),
            only: None,
            limited: Vec::new(),
            status: Status::Active,
        };
        let mut refusal = None;
        let mut limit = |directory: &Path, file: &str, value: &str| {
            let path = directory.join(file);
            match fs::write(&path, value) {
                Ok(()) => true,
                Err(error) => {
                    refusal.get_or_insert_with(|| format!("{}: {error}", path.display()));
                    false
                }
            }
        };
        let mut refused = None;
        if let Some(own) = &hierarchies.unified {
            match place(own).and_then(|parent| make_directory(&parent, name)) {
                Ok(directory) => {
                    for (controller, file, value) in v2 {
                        if directory.join(file).exists() && limit(&directory, file, value) {
                            made.limited.push(controller);
                        }
                    }
                    made.directories.push(directory);
                }
                Err(why) => refused = Some(why),
            }
        }
        for (controller, own) in &hierarchies.legacy {
            let files = v1.iter().filter(|(of, ..)| of == controller);
            let files: Vec<_> = files.collect();
            if files.is_empty() {
                continue;
            }
            match make_directory(own, name) {
                Ok(directory) => {
                    for (of, file, value) in files {
                        if directory.join(file).exists() && limit(&directory, file, value) {
                            made.limited.push(of);
                        }
                    }
                    if !made.directories.contains(&directory) {
                        made.directories.push(directory);
                    }
                }
                Err(why) => refused = refused.or(Some(why)),
            }
        }
        if let [only] = &made.directories[..]
            && hierarchies.unified.is_some()
            && hierarchies.legacy.is_empty()
        {
            made.only = Some(only.clone());
        }
        let mut missing: Vec<_> = needed
            .iter()
            .copied()
            .filter(|controller| !made.limited.contains(controller))
            .collect();
        missing.dedup();
        if !missing.is_empty() {
            let why = refused.or(refusal).unwrap_or_else(|| {
                "this host has not turned these controllers on for this user".to_owned()
            });
            let remedy = "systemd-run --user --scope -p Delegate=yes gives a user a group";
            made.status = Status::Absent(format!(
                "no limit of {}: {why}; {remedy}",
                missing.join(", ")
            ));
        }
        made
    }

    /// Removes the groups of a supervisor that was killed, and so could not. False if its VMM
    /// process, which was killed with it, has not ended in time.
    pub fn remove_left(supervisor: u32, time: Duration) -> bool {
        if Path::new(&format!("/proc/{supervisor}")).exists() {
            return true;
        }
        let name = format!("{PREFIX}{supervisor}");
        let found = Hierarchies::find();
        let unified = found.unified.iter().flat_map(|(top, own)| {
            let above = own.ancestors();
            above.take_while(move |it| it.starts_with(top))
        });
        let legacy = found.legacy.iter().map(|(_, own)| own.as_path());
        let deadline = Instant::now() + time;
        let mut free = true;
        for parent in unified.chain(legacy) {
            let directory = parent.join(&name);
            while let Err(error) = fs::remove_dir(&directory)
                && error.kind() == ErrorKind::ResourceBusy
            {
                if Instant::now() >= deadline {
                    free = false;
                    break;
                }
                thread::sleep(PAUSE);
            }
        }
        free
    }

    /// Puts a process into the groups. If the host does not let this user, it is
    /// without limits.
    pub fn add(&mut self, pid: u32) {
        for directory in &self.directories {
            let path = directory.join("cgroup.procs");
            if let Err(error) = fs::write(&path, pid.to_string()) {
                self.status = Status::Absent(format!("{}: {error}", path.display()));
            }
        }
    }

    /// The way into the groups for programs that are started, which must not begin outside:
    /// what they start would stay there.
    pub fn door(&self) -> Door {
        let open = |directory: &PathBuf| {
            let path = directory.join("cgroup.procs");
            fs::OpenOptions::new().write(true).open(path).ok()
        };
        Door(self.directories.iter().filter_map(open).collect())
    }

    /// The directory of a group that a process can be made in, rather than put into later.
    pub fn entrance(&self) -> Option<OwnedFd> {
        let mut options = fs::OpenOptions::new();
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let directory = options.read(true).custom_flags(flags);
        Some(directory.open(self.only.as_ref()?).ok()?.into())
    }

    /// Whether there are limits.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// The groups' directories.
    pub fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    /// Its process was ended because it needed more memory than it may have.
    pub fn ran_out_of_memory(&self) -> bool {
        let killed = |file: &str| {
            self.directories.iter().any(|directory| {
                let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
                value_of(&text, "oom_kill").is_some_and(|count| count > 0)
            })
        };
        killed("memory.events") || killed("memory.oom_control")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for directory in &self.directories {
            // A process that was killed may be in it for another moment. After that whoever
            // comes next removes what is still in use.
            let mut tries = 0..REMOVALS;
            while fs::remove_dir(directory)
                .is_err_and(|error| error.kind() == ErrorKind::ResourceBusy)
                && tries.next().is_some()
            {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// Files that a process writes to that comes into groups.
#[derive(Debug, Default)]
pub struct Door(Vec<fs::File>);

impl Door {
    /// Has a program be in the groups before anything else that it is to do. One that the
    /// host does not let in stays outside: the VMM process is refused as well then, which is
    /// told.
    pub fn lead(&self, command: &mut Command) -> io::Result<()> {
        let files = self.0.iter().map(fs::File::try_clone);
        let files = files.collect::<io::Result<Vec<_>>>()?;
        let enter = move || {
            for mut file in &files {
                // The process that writes.
                let _ = file.write_all(b"0");
            }
            Ok(())
        };
        // SAFETY: what runs between fork and exec are system calls.
        unsafe { command.pre_exec(enter) };
        Ok(())
    }
}

/// What the processes of a VM's groups use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupUsage {
    /// The CPU time, in microseconds.
    pub cpu_us: Option<u64>,
    /// Bytes of memory, without what is only kept as it may be read again.
    pub memory: Option<u64>,
}

impl GroupUsage {
    /// What the groups of a VMM process use, which its supervisor made; nothing is
    /// known if there are none.
    pub fn of_process(pid: u32, supervisor: u32) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let groups = read(&format!("/proc/{pid}/cgroup"));
        let found = Hierarchies::parse(&read("/proc/self/mountinfo"), &groups);
        let all = found.unified.into_iter().map(|(_, directory)| directory);
        let all = all.chain(found.legacy.into_iter().map(|(_, directory)| directory));
        let name = format!("{PREFIX}{supervisor}");
        let its: Vec<_> = all.filter(|directory| directory.ends_with(&name)).collect();
        GroupUsage::of(&its)
    }

    /// Reads it from the groups' directories.
    fn of(directories: &[PathBuf]) -> Self {
        let read = |file: &str| {
            let mut all = directories.iter();
            all.find_map(|directory| fs::read_to_string(directory.join(file)).ok())
        };
        let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
        let cpu = read("cpu.stat").and_then(|text| value_of(&text, "usage_usec"));
        let cpu = cpu.or_else(|| number("cpuacct.usage").map(|ns| ns / 1000));
        let memory = number("memory.current").or_else(|| number("memory.usage_in_bytes"));
        let statistics = read("memory.stat").unwrap_or_default();
        let kept = value_of(&statistics, "total_inactive_file")
            .or_else(|| value_of(&statistics, "inactive_file"));
        GroupUsage {
            cpu_us: cpu,
            memory: memory.map(|all| all.saturating_sub(kept.unwrap_or(0))),
        }
    }
}

/// The number behind a name, in lines of both.
fn value_of(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(|line| line.split_once(' '));
    lines.find_map(|line| match line {
        Some((key, value)) if key == name => value.trim().parse().ok(),
        _ => None,
    })
}

/// Whether this process may have groups of version 2 below its own.
pub fn may_divide() -> bool {
    let own = Hierarchies::find().unified;
    own.is_some_and(|(_, directory)| rustix::fs::access(directory, Access::WRITE_OK).is_ok())
}

/// The cgroups of this process.
#[derive(Debug, Default)]
struct Hierarchies {
    /// In that of version 2: its mount point, and the group's directory.
    unified: Option<(PathBuf, PathBuf)>,
    /// In those of version 1, by controller.
    legacy: Vec<(String, PathBuf)>,
}

impl Hierarchies {
    fn find() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Hierarchies::parse(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"))
    }

    /// See `proc_pid_mountinfo(5)` and `cgroups(7)`.
    fn parse(mounts: &str, groups: &str) -> Self {
        let mut found = Hierarchies::default();
        for group in groups.lines() {
            let mut fields = group.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            for mount in mounts.lines() {
                let Some((left, right)) = mount.split_once(" - ") else {
                    continue;
                };
                let mut left = left.split(' ').skip(3);
                let (Some(root), Some(point)) = (left.next(), left.next()) else {
                    continue;
                };
                let mut right = right.split(' ');
                let (kind, options) = (right.next(), right.nth(1).unwrap_or_default());
                // The mount may show a part of the hierarchy.
                let Ok(below) = Path::new(path).strip_prefix(root) else {
                    continue;
                };
                let directory = Path::new(point).join(below);
                match (controllers, kind) {
                    ("", Some("cgroup2")) => found.unified = Some((point.into(), directory)),
                    ("", _) => {}
                    (_, Some("cgroup")) => {
                        let has = |it: &&str| options.split(',').any(|option| option == *it);
                        if controllers.split(',').all(|it| has(&it)) {
                            for controller in controllers.split(',') {
                                found.legacy.push((controller.into(), directory.clone()));
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
        found
    }
}

/// The nearest group above this process that may have groups with limits: a group
/// with processes may not. Turns its controllers on.
fn place((top, own): &(PathBuf, PathBuf)) -> Result<PathBuf, String> {
    let mut why = None;
    for directory in own.ancestors().take_while(|it| it.starts_with(top)) {
        let procs = directory.join("cgroup.procs");
        let busy = fs::read_to_string(&procs).is_ok_and(|text| !text.trim().is_empty());
        if busy && directory != top {
            continue;
        }
        match fs::OpenOptions::new().write(true).open(&procs) {
            Ok(_) => {
                for controller in TURNED_ON {
                    // What can't be turned on has no files later.
                    let turn_on = format!("+{controller}");
                    let _ = fs::write(directory.join("cgroup.subtree_control"), turn_on);
                }
                return Ok(directory.to_owned());
            }
            Err(error) => {
                why.get_or_insert_with(|| format!("{}: {error}", directory.display()));
            }
        }
    }
    Err(why.unwrap_or_else(|| format!("{}: no group for it", own.display())))
}

/// Makes a group's directory, and removes those of supervisors that were killed.
fn make_directory(parent: &Path, name: &str) -> Result<PathBuf, String> {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let left = entry.file_name();
        let pid = left.to_str().and_then(|it| it.strip_prefix(PREFIX));
        if let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok())
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            let _ = fs::remove_dir(entry.path());
        }
    }
    let directory = parent.join(name);
    match fs::create_dir(&directory) {
        Ok(()) => Ok(directory),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(directory),
        Err(error) => Err(format!("{}: {error}", directory.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARE: Share = Share {
        cpus: 2,
        memory: 512 << 20,
        nets: 0,
        directories: 0,
    };

    #[test]
    fn finds_both_versions() {
        let mounts = "\
            30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n\
            31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            32 23 0:28 /a /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            33 23 0:29 / /tmp rw - tmpfs tmpfs rw\n";
        let groups = "3:cpu,cpuacct:/a/b\n2:memory:/m\n1:name=systemd:/x\n0::/user.slice/s\n";
        let found = Hierarchies::parse(mounts, groups);
        let unified = (
            "/sys/fs/cgroup".into(),
            "/sys/fs/cgroup/user.slice/s".into(),
        );
        assert_eq!(found.unified, Some(unified));
        let legacy = |name: &str, path: &str| (name.to_owned(), PathBuf::from(path));
        assert_eq!(
            found.legacy,
            [
                legacy("cpu", "/sys/fs/cgroup/cpu,cpuacct/b"),
                legacy("cpuacct", "/sys/fs/cgroup/cpu,cpuacct/b"),
                legacy("memory", "/sys/fs/cgroup/memory/m"),
            ]
        );
        for nonsense in ["", "\n\n", "a:b", "0::relative", " - ", "1 2 3 / - cgroup2"] {
            Hierarchies::parse(nonsense, nonsense);
        }
    }

    /// A directory that looks as a group of version 2 whose processes are elsewhere.
    fn pretend(directory: &Path) {
        fs::create_dir_all(directory).unwrap();
        for file in ["cgroup.procs", "cgroup.subtree_control"] {
            fs::write(directory.join(file), "").unwrap();
        }
    }

    #[test]
    fn a_group_with_processes_is_passed_over() {
        let top = tempfile::tempdir().unwrap();
        let own = top.path().join("slice/scope");
        for directory in [top.path(), &top.path().join("slice"), &own] {
            pretend(directory);
        }
        fs::write(own.join("cgroup.procs"), "1\n").unwrap();
        let here = (top.path().to_owned(), own.clone());
        assert_eq!(place(&here).unwrap(), top.path().join("slice"));
        let turned_on = fs::read_to_string(top.path().join("slice/cgroup.subtree_control"));
        assert_eq!(turned_on.unwrap(), "+io");
    }

    #[test]
    fn what_a_host_does_not_offer_is_said() {
        let mut made = Cgroup::make_in(
            "x",
            &(SHARE.v2(), SHARE.v1()),
            &CONTROLLERS,
            &Hierarchies::default(),
        );
        made.add(1);
        let Status::Absent(why) = made.status() else {
            panic!();
        };
        assert!(why.starts_with("no limit of memory, cpu, pids"), "{why}");
    }

    #[test]
    fn usage_is_read_from_either_version() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        let usage = || GroupUsage::of(&[directory.path().to_owned()]);
        assert_eq!(usage(), GroupUsage::default());
        write("cpuacct.usage", "5000\n");
        write("memory.usage_in_bytes", "900\n");
        write("memory.stat", "inactive_file 1\ntotal_inactive_file 100\n");
        let expected = |cpu_us, memory| GroupUsage {
            cpu_us: Some(cpu_us),
            memory: Some(memory),
        };
        assert_eq!(usage(), expected(5, 800));
        write("cpu.stat", "usage_usec 7\nuser_usec 3\n");
        write("memory.current", "50\n");
        assert_eq!(usage(), expected(7, 0));
    }

    #[test]
    fn limits_are_the_guest_s_and_something_beside() {
        assert_eq!(SHARE.memory_limit(), (512 + 64 + 4 + 8) << 20);
        let helped = Share {
            nets: 1,
            directories: 2,
            ..SHARE
        };
        let beside = helped.memory_limit() - SHARE.memory_limit();
        assert_eq!(beside, (96 + 2 * 512) << 20);
        assert_eq!(helped.threads() - SHARE.threads(), 240);
        assert_eq!(SHARE.v2()[1].2, "200000 100000");
    }
}
