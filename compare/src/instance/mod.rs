//! Instances of engines: launched, watched on one clock, ended.

#![allow(
    unsafe_code,
    reason = "what runs between fork and exec, and the scheduler"
)]

pub mod batch;
mod watch;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use mayfly_process::programs::{inherit, unblock_signals};
use rustix::io::ioctl_fionread;
use rustix::process::{Pid, Signal, getpid, getppid};
use rustix::time::{ClockId, clock_gettime};

use self::watch::Watch;
use super::model::{Mark, Sample};
use super::overlay::Overlay;
use super::undo::undo;

/// Before each of the probe's records (see `guest/src/probe`).
const RECORD: u8 = 0x1e;
/// The bytes of an instance's output that are read at once, and of its errors that are kept.
const CHUNK: usize = 16 << 10;
const ERRORS_MAX: usize = 4 << 10;
/// A record is shorter than this.
const RECORD_MAX: usize = 64 << 10;
/// Of marks that an engine tells, a line is shorter than this.
const LINE_MAX: usize = 4 << 10;
const NANOSECONDS: u64 = 1_000_000_000;
/// A status above this is the number of the signal that killed a process, and this.
const SIGNALLED: i32 = 128;

/// The clock of all marks: `CLOCK_MONOTONIC`, in nanoseconds.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec) * NANOSECONDS + part(time.tv_nsec)
}

/// Lets this thread run as soon as it wakes, so that a busy machine does not make marks
/// late, where the host allows it. Who is launched runs as usual.
pub fn hurry() {
    let how = libc::sched_param { sched_priority: 1 };
    // SAFETY: reads a live structure.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &how) };
}

/// How a mark shows, besides those that the probe says.
#[derive(Debug)]
pub enum Sign {
    /// A file or directory appears. What its directory lies in exists; the directory itself may
    /// appear, too.
    File(PathBuf, Mark),
    /// A file that is there is opened.
    FileOpened(PathBuf, Mark),
    /// A byte arrives.
    Byte(OwnedFd, Mark),
    /// Lines arrive: a mark's name and its time, if that is not now (`built`, `built 123`);
    /// or `note TEXT`.
    Lines(OwnedFd),
    /// The launcher's last line is mayfly's record.
    Record,
}

/// An instance that is to be launched.
#[derive(Debug, Default)]
pub struct Launch {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// What is added to the environment.
    pub env: Vec<(String, OsString)>,
    /// What the probe's records begin with.
    pub nonce: String,
    /// The signs of its marks.
    pub signs: Vec<Sign>,
    /// Stay open for the launcher.
    pub inherited: Vec<OwnedFd>,
    /// What asks it to end; else SIGTERM does.
    pub stop: Option<Vec<OsString>>,
    /// The launcher's status is not the command's.
    pub own_status: bool,
    /// What removes it, whatever happened to its launcher.
    pub undo: Vec<Vec<OsString>>,
    /// What the launcher finds mounted.
    pub overlay: Option<Overlay>,
}

/// One that was launched.
#[derive(Debug)]
pub struct Instance {
    launch: Launch,
    /// The launcher's process.
    pub pid: Pid,
    started: u64,
    output: Option<File>,
    errors: Option<File>,
    unread: Vec<u8>,
    /// The last line that might be mayfly's own record.
    last: Option<String>,
    /// The start of a line of marks.
    line: Vec<u8>,
    complaint: Vec<u8>,
    /// Times of the clock.
    marks: BTreeMap<Mark, u64>,
    /// The launcher's status, once it ended.
    status: Option<i32>,
    /// The probe's.
    command_status: Option<i32>,
    /// The data that the probe reported.
    pub data: Option<String>,
    /// Notes for the report.
    pub notes: Vec<String>,
}

impl Instance {
    /// Launches one.
    fn launch(mut launch: Launch, watch: &mut Watch) -> io::Result<Self> {
        let [program, arguments @ ..] = launch.command.as_slice() else {
            return Err(io::Error::other("no command"));
        };
        for sign in &launch.signs {
            match sign {
                Sign::File(path, _) => watch.await_path(path)?,
                Sign::FileOpened(path, _) => watch.await_opening(path)?,
                _ => {}
            }
        }
        let (output, their_output) = io::pipe()?;
        let (errors, their_errors) = io::pipe()?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(launch.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(their_output)
            .stderr(their_errors);
        let inherited: Vec<_> = launch.inherited.iter().map(AsRawFd::as_raw_fd).collect();
        let overlay = launch.overlay.take();
        let parent = getpid();
        // A terminal's Ctrl-C is for us: who is ended is ended in order. And if both of our
        // halves are killed, nobody else ends it.
        // SAFETY: what runs between fork and exec are system calls.
        unsafe {
            command.pre_exec(move || {
                unblock_signals()?;
                rustix::process::setsid()?;
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if getppid() != Some(parent) {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                overlay.as_ref().map_or(Ok(()), Overlay::mount)?;
                inherited.iter().copied().try_for_each(inherit)
            });
        }
        let started = now();
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        Ok(Instance {
            launch: Launch {
                // The other ends are the launcher's alone.
                inherited: Vec::new(),
                ..launch
            },
            pid,
            started,
            output: Some(OwnedFd::from(output).into()),
            errors: Some(OwnedFd::from(errors).into()),
            unread: Vec::new(),
            last: None,
            line: Vec::new(),
            complaint: Vec::new(),
            marks: BTreeMap::new(),
            status: None,
            command_status: None,
            data: None,
            notes: Vec::new(),
        })
    }

    /// The mark was seen.
    pub fn has(&self, mark: Mark) -> bool {
        self.marks.contains_key(&mark)
    }

    /// The launcher ended.
    pub fn ended(&self) -> bool {
        self.status.is_some()
    }

    /// When it was launched, by the clock.
    pub fn launched(&self) -> u64 {
        self.started
    }

    /// When a mark was seen, by the clock.
    pub fn at(&self, mark: Mark) -> Option<u64> {
        self.marks.get(&mark).copied()
    }

    /// When a mark was seen, in nanoseconds since the launch.
    pub fn since_launch(&self, mark: Mark) -> Option<u64> {
        Some(self.marks.get(&mark)?.saturating_sub(self.started))
    }

    /// Removes what it left, as it did not end as it should.
    pub fn undo(&self) {
        undo(&self.launch.undo);
    }

    /// Why it is no sample: it did not do what it should.
    pub fn error(&self) -> Option<String> {
        let said = String::from_utf8_lossy(&self.complaint);
        let said = said.trim();
        let because = |what: String| match said.is_empty() {
            true => what,
            false => format!("{what}: {}", said.replace('\n', "; ")),
        };
        match (self.status, self.command_status) {
            (None, _) => Some(because("it did not end".into())),
            (Some(status), None) if !self.has(Mark::Command) => Some(because(format!(
                "the command did not begin (status {status})"
            ))),
            (_, Some(status @ (126 | 127))) => Some(because(format!(
                "the command could not be run (exit status {status})"
            ))),
            (Some(status), None) => Some(because(format!(
                "the command did not end (status {status})"
            ))),
            (Some(status), Some(own)) if status != own && !self.launch.own_status => Some(because(
                format!("the launcher's status is {status}, the command's {own}"),
            )),
            (Some(_), Some(_)) if !self.has(Mark::Gone) => {
                Some(because("what it started did not end".into()))
            }
            (Some(_), Some(own)) => self.failed_command().map(|_| because(failure_of(own))),
        }
    }

    /// The exit status of a command that failed, where all else is well.
    pub fn failed_command(&self) -> Option<i32> {
        let launcher = self.launch.own_status || self.status == self.command_status;
        let status = self.command_status.filter(|&status| status != 0)?;
        (launcher && self.has(Mark::Gone)).then_some(status)
    }

    /// As a sample of a comparison.
    pub fn sample(&self, round: u32, position: u32) -> Sample {
        let mut next = u64::MAX;
        let mut marks_ns = BTreeMap::new();
        for &mark in self.marks.keys().rev() {
            // A sign that came late was true before what followed.
            let at = self.since_launch(mark).unwrap_or(0).min(next);
            marks_ns.insert(mark, at);
            next = at;
        }
        Sample {
            round,
            position,
            marks_ns,
            status: self.status,
            command_status: self.command_status,
            error: self.error(),
        }
    }

    /// Takes what has arrived of what it prints.
    fn take_rest(&mut self, at: u64) {
        for _ in 0..reads(self.output.as_ref()) {
            self.take_output(at);
        }
        for _ in 0..reads(self.errors.as_ref()) {
            self.take_errors();
        }
    }

    fn mark(&mut self, mark: Mark, at: u64) {
        self.marks.entry(mark).or_insert(at);
    }

    fn take_output(&mut self, at: u64) {
        let mut chunk = vec![0; CHUNK];
        match self.output.as_mut().map(|output| output.read(&mut chunk)) {
            Some(Ok(len)) if len > 0 => {
                self.unread
                    .extend_from_slice(chunk.get(..len).unwrap_or(&[]));
                self.take_records(at);
            }
            Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => self.output = None,
        }
    }

    /// Finds records between whatever else the command prints. A terminal between it and
    /// us may have put a return before the line's end.
    fn take_records(&mut self, at: u64) {
        let unread = std::mem::take(&mut self.unread);
        let mut lines = unread.split(|&byte| byte == b'\n');
        let mut rest = lines.next_back().unwrap_or_default().to_vec();
        for line in lines {
            // What the command printed may end in such a byte, too.
            let start = line.iter().rposition(|&byte| byte == RECORD);
            let line = line.get(start.map_or(0, |start| start + 1)..);
            let line = String::from_utf8_lossy(line.unwrap_or_default());
            let line = line.trim_end();
            match start.and_then(|_| line.strip_prefix("mayfly ")) {
                Some(words) => self.take_record(words, at),
                None if line.starts_with('{') => self.last = Some(line.to_owned()),
                None => {}
            }
        }
        let keep = rest.len().saturating_sub(RECORD_MAX);
        rest.drain(..keep);
        self.unread = rest;
    }

    fn take_record(&mut self, words: &str, at: u64) {
        let Some(words) = words.strip_prefix(self.launch.nonce.as_str()) else {
            return;
        };
        let words = words.trim_start();
        match words.split_once(' ').unwrap_or((words, "")) {
            ("started", "") => self.mark(Mark::Command, at),
            ("ended", status) => {
                self.mark(Mark::Exit, at);
                self.command_status = status.parse().ok();
            }
            ("data", data) => {
                self.data = Some(data.to_owned());
                self.command_status = Some(0);
            }
            _ => {}
        }
    }

    fn take_errors(&mut self) {
        let mut chunk = vec![0; CHUNK];
        match self.errors.as_mut().map(|errors| errors.read(&mut chunk)) {
            Some(Ok(len)) if len > 0 => {
                let room = ERRORS_MAX.saturating_sub(self.complaint.len());
                let taken = chunk.get(..len.min(room)).unwrap_or(&[]);
                self.complaint.extend_from_slice(taken);
            }
            Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => self.errors = None,
        }
    }

    /// Takes what a sign's descriptor has; returns whether more may come.
    fn take_sign(&mut self, index: usize, at: u64) -> bool {
        let mut chunk = [0; 1024];
        let Some(sign) = self.launch.signs.get(index) else {
            return false;
        };
        match sign {
            Sign::Byte(fd, mark) => {
                let mark = *mark;
                let came = rustix::io::read(fd, &mut chunk).is_ok_and(|len| len > 0);
                if came {
                    self.mark(mark, at);
                }
                false
            }
            Sign::Lines(fd) => {
                let read = rustix::io::read(fd, &mut chunk);
                let len = read.as_ref().map_or(0, |&len| len);
                self.line.extend_from_slice(chunk.get(..len).unwrap_or(&[]));
                if len == 0 && !self.line.is_empty() {
                    // The last one may lack its end.
                    self.line.push(b'\n');
                }
                while let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
                    let line: Vec<u8> = self.line.drain(..=end).collect();
                    self.take_line(String::from_utf8_lossy(&line).trim_end(), at);
                }
                if self.line.len() > LINE_MAX {
                    self.line.clear();
                }
                len > 0
            }
            Sign::File(..) | Sign::FileOpened(..) | Sign::Record => false,
        }
    }

    fn take_line(&mut self, line: &str, at: u64) {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("note", text) => self.notes.push(text.to_owned()),
            (word, time) => {
                let mark = Mark::named(word);
                let time = match time {
                    "" => Ok(at),
                    time => time.parse(),
                };
                if let (Some(mark), Ok(time)) = (mark, time) {
                    self.mark(mark, time);
                }
            }
        }
    }

    /// Looks which of the awaited files are there.
    fn take_files(&mut self, watch: &mut Watch, appeared: &[PathBuf], at: u64) {
        let mut seen = Vec::new();
        for sign in &self.launch.signs {
            let (mark, seen_now) = match sign {
                Sign::File(path, mark) => (mark, watch.is_there(path, appeared)),
                Sign::FileOpened(path, mark) => (mark, appeared.contains(path)),
                _ => continue,
            };
            if seen_now && !self.marks.contains_key(mark) {
                seen.push(*mark);
            }
        }
        for mark in seen {
            self.mark(mark, at);
        }
    }

    /// What mayfly itself says of its phases, in its last line.
    fn take_mayfly_record(&mut self) {
        let wanted = self
            .launch
            .signs
            .iter()
            .any(|it| matches!(it, Sign::Record));
        let record = self.last.as_deref();
        let record: Option<serde_json::Value> =
            record.and_then(|line| serde_json::from_str(line).ok());
        let Some(record) = record.filter(|_| wanted) else {
            return;
        };
        let Some(start) = record["started_us"].as_u64() else {
            return;
        };
        self.mark(Mark::Launched, start * 1000);
        let phases = [
            (Mark::Built, "kernel_loaded"),
            (Mark::Kernel, "vcpus_started"),
            (Mark::Init, "guest_init"),
        ];
        for (mark, name) in phases {
            if let Some(time) = record["timing_us"][name].as_u64() {
                self.mark(mark, (start + time) * 1000);
            }
        }
    }
}

/// Says that a command failed.
fn failure_of(status: i32) -> String {
    match status.checked_sub(SIGNALLED) {
        Some(signal @ 1..=64) => format!(
            "the command's exit status is {status}, as of one that was killed by signal {signal}"
        ),
        _ => format!("the command's exit status is {status}"),
    }
}

/// How often a pipe has to be read for what it has now; whoever still writes to it may do
/// so for ever.
fn reads(file: Option<&File>) -> usize {
    let held = file.and_then(|file| ioctl_fionread(file).ok()).unwrap_or(0);
    usize::try_from(held).unwrap_or(0).div_ceil(CHUNK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// One whose launcher ends at once.
    fn instance(signs: Vec<Sign>) -> Instance {
        let launch = Launch {
            command: vec!["true".into()],
            nonce: "12".into(),
            signs,
            ..Launch::default()
        };
        Instance::launch(launch, &mut Watch::new().unwrap()).unwrap()
    }

    fn after(output: &str) -> Instance {
        let mut instance = instance(vec![Sign::Record]);
        instance.unread = output.as_bytes().to_vec();
        instance.take_records(7);
        instance.take_mayfly_record();
        instance
    }

    #[test]
    fn what_a_command_prints_hides_no_record() {
        let own = "{\"started_us\": 3, \"timing_us\": {}}\n";
        for printed in [
            "",
            "text\n",
            "text",
            "\x1e",
            "\n\x1e",
            "\x1emayfly 12 ",
            "\x1emayfly 34 ended 5\n",
            "{\n",
        ] {
            let all =
                format!("\x1emayfly 12 started\r\n{printed}\x1emayfly 12 ended 3\r\n\x1e{own}");
            let instance = after(&all);
            assert!(
                instance.has(Mark::Command) && instance.has(Mark::Exit),
                "{printed:?}"
            );
            assert_eq!(instance.command_status, Some(3), "{printed:?}");
            assert_eq!(instance.at(Mark::Launched), Some(3000), "{printed:?}");
        }
        // However much it is, and wherever it is cut.
        let mut instance = instance(Vec::new());
        for chunk in [
            "\x1e".repeat(3 * RECORD_MAX).as_str(),
            "\x1emayf",
            "ly 12 ended 4",
            "\n",
        ] {
            instance.unread.extend_from_slice(chunk.as_bytes());
            instance.take_records(7);
            assert!(instance.unread.len() <= RECORD_MAX);
        }
        assert_eq!(instance.command_status, Some(4));
    }

    #[test]
    fn what_comes_for_ever_is_not_read_for_ever() {
        let mut instance = instance(Vec::new());
        instance.output = Some(File::open("/dev/zero").unwrap());
        instance.take_rest(7);
        let (read, mut write) = io::pipe().unwrap();
        write.write_all(b"\x1emayfly 12 ended 0\n").unwrap();
        instance.output = Some(OwnedFd::from(read).into());
        // Somebody may write yet.
        instance.take_rest(8);
        assert_eq!(instance.at(Mark::Exit), Some(8));
    }

    #[test]
    fn a_line_may_come_in_pieces() {
        let (read, mut write) = io::pipe().unwrap();
        let mut instance = instance(vec![Sign::Lines(read.into())]);
        for (piece, at) in [
            ("note a", 1),
            ("b\nbui", 2),
            ("lt 12", 3),
            ("34\nker", 4),
            ("nel", 5),
        ] {
            write.write_all(piece.as_bytes()).unwrap();
            assert!(instance.take_sign(0, at));
        }
        drop(write);
        assert!(!instance.take_sign(0, 6));
        assert_eq!(instance.notes, ["ab"]);
        assert_eq!(instance.at(Mark::Built), Some(1234));
        assert_eq!(instance.at(Mark::Kernel), Some(6));
    }
}
