//! A process that stands in for a VMM which its guest has taken over: inside the closed
//! sandbox, as each kind of thread, it tries one way out after the other.
//!
//! Each attempt has a process of its own. It must fail there, once by the filter of system
//! calls, and once without it by the other layers, where these reach that far; and it must
//! succeed without the sandbox, so that it does not fail for another reason.

#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod attempts;
mod loot;
mod whole;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mayfly_sandbox::{
    self as sandbox, Keep, Layer, Limits, Mode, Policy, Role, SandboxSetup, Status,
    ThreadConfinement,
};

use attempts::{ATTEMPTS, Alone, Attempt};
use loot::{Held, Loot};

/// What nobody has.
const NOBODY: u32 = 65534;
/// The attempt succeeded; else the status is its error's number.
const OUT: u8 = 0;
/// The sandbox did not close, or a thread did not start.
const BROKEN: u8 = 250;
const TIMEOUT: Duration = Duration::from_secs(20);

/// What an attempt is surrounded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Walls {
    /// All, for a thread of a role.
    All(Role),
    /// All but the filter of system calls.
    Outer,
    /// None.
    None,
}

const WALLS: [Walls; 5] = [
    Walls::All(Role::Vcpu),
    Walls::All(Role::EventLoop),
    Walls::All(Role::Io),
    Walls::Outer,
    Walls::None,
];

/// What came of an attempt.
#[derive(Debug, PartialEq, Eq)]
enum Result {
    Out,
    Refused(String),
    /// By the filter: the system call's name.
    Filtered(String),
    Broken(String),
}

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let filter = args.iter().find(|arg| !arg.starts_with("--"));
    let loot = match Loot::gather() {
        Ok(loot) => loot,
        Err(error) => {
            println!("preparing: {error}\ntest result: FAILED");
            return ExitCode::FAILURE;
        }
    };
    let root = loot.is_root();
    println!("\nas {}:", if root { "root" } else { "an ordinary user" });
    let mut passed = 0;
    let mut failures = report(&mut passed);
    for (name, result) in [
        (
            "every thread is confined",
            whole::every_thread_is_confined(root),
        ),
        (
            "a killed supervisor takes it along",
            whole::a_killed_supervisor_takes_it_along(),
        ),
        (
            "what is missing is named",
            whole::what_is_missing_is_named(),
        ),
        ("the ordinary is allowed", whole::the_ordinary_is_allowed()),
        (
            "a process with threads",
            whole::a_process_with_threads_is_not_divided(),
        ),
    ] {
        println!(
            "{name:<34} {}",
            if result.is_ok() { "ok" } else { "FAILED" }
        );
        failures.extend(result.err().map(|why| format!("{name}: {why}")));
        passed += 1;
    }
    for attempt in ATTEMPTS {
        if filter.is_some_and(|filter| !attempt.name.contains(filter.as_str())) {
            continue;
        }
        let (told, wrong) = judge(attempt, &loot);
        println!("{:<34} {told}", attempt.name);
        failures.extend(
            wrong
                .into_iter()
                .map(|why| format!("{}: {why}", attempt.name)),
        );
        passed += 1;
    }
    if filter.is_none() {
        failures.extend(enough(root).err());
    }
    for failure in &failures {
        println!("FAILED: {failure}");
    }
    if !failures.is_empty() {
        println!("test result: FAILED");
        return ExitCode::FAILURE;
    }
    println!("test result: ok. {passed} passed; 0 failed");
    match root {
        true => as_nobody(&args, &loot),
        false => ExitCode::SUCCESS,
    }
}

/// There is no point in a suite whose attempts could not succeed anyway.
fn enough(root: bool) -> std::result::Result<(), String> {
    let able = ATTEMPTS.iter().filter(|it| it.alone.is_able(root)).count();
    match ATTEMPTS.len() > 60 && able * 2 > ATTEMPTS.len() {
        true => Ok(()),
        false => Err(format!("only {able} of {} can succeed", ATTEMPTS.len())),
    }
}

/// The layers that every host of these tests has are active.
fn report(passed: &mut usize) -> Vec<String> {
    let policy = Policy {
        mode: Mode::On,
        new_net: true,
    };
    let begun = Instant::now();
    let report = match sandbox::probe(&policy) {
        Ok(report) => report,
        Err(error) => return vec![format!("probing: {error}")],
    };
    print!("{report}");
    println!("made, closed and gone in {:.1?}", begun.elapsed());
    *passed += 1;
    // An old kernel lacks Landlock; the cgroup is not the VMM's to tell.
    let needed = Layer::ALL.into_iter();
    let needed = needed.filter(|layer| ![Layer::Landlock, Layer::Cgroup].contains(layer));
    needed
        .filter(|&layer| report.get(layer) != Some(&Status::Active))
        .map(|layer| format!("{layer}: {:?}", report.get(layer)))
        .collect()
}

/// Tries it behind all walls, and tells what came of it and what is wrong with that.
fn judge(attempt: &Attempt, loot: &Loot) -> (String, Vec<String>) {
    let mut told: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for walls in WALLS {
        let place = match walls {
            Walls::All(role) => role.name(),
            Walls::Outer => "unfiltered",
            Walls::None if attempt.alone.is_able(loot.is_root()) => "no sandbox",
            Walls::None => continue,
        };
        let result = attempt.run_in(walls, loot);
        let expected = match (&result, walls) {
            // Not because of something that the attempt merely needs.
            (Result::Filtered(call), Walls::All(_)) => attempt.calls.contains(&call.as_str()),
            (Result::Refused(_), Walls::All(_)) => true,
            (Result::Refused(_), Walls::Outer) => true,
            (Result::Out, Walls::Outer) => !attempt.outer,
            (Result::Out, Walls::None) => true,
            _ => false,
        };
        let what = match result {
            Result::Out => "possible".to_owned(),
            Result::Refused(how) => format!("refused: {how}"),
            Result::Filtered(call) => format!("refused: no system call {call}"),
            Result::Broken(why) => format!("broken: {why}"),
        };
        if !expected {
            wrong.push(format!("{place}: {what}"));
        }
        told.entry(what).or_default().push(place);
    }
    let told = told
        .into_iter()
        .map(|(what, places)| format!("{what} ({})", places.join(", ")));
    (told.collect::<Vec<_>>().join("; "), wrong)
}

impl Attempt {
    fn run_in(&self, walls: Walls, loot: &Loot) -> Result {
        let mode = match walls {
            Walls::None => Mode::Off,
            _ => Mode::On,
        };
        let policy = Policy {
            mode,
            new_net: true,
        };
        let (mut said, theirs) = match io::pipe() {
            Ok(pipe) => pipe,
            Err(error) => return Result::Broken(error.to_string()),
        };
        let tcp = loot::socket(libc::AF_INET, libc::SOCK_STREAM);
        let child = sandbox::spawn(&policy, |setup| {
            // SAFETY: two numbers.
            unsafe { libc::dup2(theirs.as_raw_fd(), libc::STDERR_FILENO) };
            tcp.map_or(BROKEN, |tcp| self.inside(setup, walls, loot, tcp))
        });
        drop(theirs);
        let mut child = match child {
            Ok(child) => child,
            Err(error) => return Result::Broken(error.to_string()),
        };
        let begun = Instant::now();
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if begun.elapsed() < TIMEOUT => {
                    std::thread::sleep(Duration::from_micros(500));
                }
                other => return Result::Broken(format!("it does not end: {other:?}")),
            }
        };
        // What was started by an attempt that succeeded may still have the pipe.
        set_nonblocking(&said);
        let mut text = Vec::new();
        let _ = said.read_to_end(&mut text);
        understood(status, &String::from_utf8_lossy(&text))
    }

    fn inside(&self, setup: SandboxSetup, walls: Walls, loot: &Loot, tcp: OwnedFd) -> u8 {
        let Ok(loot) = loot.hold(walls == Walls::None, tcp) else {
            return BROKEN;
        };
        let limits = Limits {
            files: 256,
            file_size: Some(loot::DISK_MAX),
            address_space_extra: Some(loot::MEMORY_MAX),
        };
        let kept = loot.kept();
        let keep = match walls {
            Walls::None => Keep::All,
            _ => Keep::Only(&kept),
        };
        let confinement = match setup.close(&limits, keep) {
            Ok(confinement) => confinement,
            Err(failure) => {
                eprintln!("{failure}");
                return BROKEN;
            }
        };
        match walls {
            Walls::All(Role::EventLoop) => self.confined(&confinement, Role::EventLoop, &loot),
            Walls::All(role) => {
                let thread = std::thread::scope(|scope| {
                    let work = || self.confined(&confinement, role, &loot);
                    let thread = std::thread::Builder::new().name(role.name().to_owned());
                    thread.spawn_scoped(scope, work).map(|it| it.join())
                });
                thread.ok().and_then(|it| it.ok()).unwrap_or(BROKEN)
            }
            Walls::Outer | Walls::None => self.status(&loot),
        }
    }

    fn confined(&self, confinement: &ThreadConfinement, role: Role, loot: &Held) -> u8 {
        match confinement.confine(role) {
            Ok(()) => self.status(loot),
            Err(error) => {
                eprintln!("{error}");
                BROKEN
            }
        }
    }

    fn status(&self, loot: &Held) -> u8 {
        let status = match (self.run)(loot) {
            Ok(()) => OUT,
            Err(error) => error
                .raw_os_error()
                .and_then(|number| u8::try_from(number).ok())
                .unwrap_or(BROKEN),
        };
        // At once, whichever thread this is.
        // SAFETY: ends the process; nothing runs after.
        unsafe { libc::_exit(status.into()) }
    }
}

fn understood(status: ExitStatus, said: &str) -> Result {
    const CALL: &str = "made the forbidden system call ";
    let call = said
        .split_once(CALL)
        .and_then(|(_, rest)| rest.split_once(" ("))
        .and_then(|(_, rest)| rest.split_once(')'));
    match (status.code(), call) {
        (Some(0), _) => Result::Out,
        (Some(code), Some((call, _))) if code == i32::from(sandbox::VIOLATION) => {
            Result::Filtered(call.to_owned())
        }
        (Some(code @ 1..134), _) => Result::Refused(io::Error::from_raw_os_error(code).to_string()),
        (None, _) if status.signal() == Some(libc::SIGSYS) => Result::Refused("SIGSYS".to_owned()),
        _ => Result::Broken(format!("{status}: {said}")),
    }
}

fn set_nonblocking(pipe: &io::PipeReader) {
    // SAFETY: an open descriptor, and numbers.
    unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
}

/// The same once more, as an ordinary user, who may not see the binary where it is.
fn as_nobody(args: &[String], loot: &Loot) -> ExitCode {
    let again = || -> io::Result<ExitStatus> {
        let folder = tempfile::tempdir()?;
        let own = folder.path().join("breakout");
        fs::copy(std::env::current_exe()?, &own)?;
        let open = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
        fs::set_permissions(folder.path(), open.clone())?;
        fs::set_permissions(&own, open)?;
        let mut command = Command::new(&own);
        command
            .args(args)
            .env_clear()
            .stdin(Stdio::null())
            .current_dir("/")
            .uid(NOBODY)
            .gid(NOBODY);
        loot.inherited(&mut command);
        command.status()
    };
    match again() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        other => {
            println!("as an ordinary user: {other:?}\ntest result: FAILED");
            ExitCode::FAILURE
        }
    }
}

impl Alone {
    /// An unconfined process can do it.
    fn is_able(self, root: bool) -> bool {
        match self {
            Alone::Everyone => true,
            Alone::Root => root,
            Alone::Untried => false,
        }
    }
}
