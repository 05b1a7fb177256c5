//! A process beside the VM: it has one end of a socket, and ends when the other is
//! closed, so that it never outlives the VM, however that ends.

#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::ffi::CStr;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_devices::bus::lock;
use mayfly_devices::poll::ready;
use mayfly_process::programs::{end_with_us, inherit, unblock_signals};
use mayfly_sandbox as sandbox;

use crate::failure::{Failure, OrFail};
use crate::signals::StartSignals;

/// How long it may take to end when it is asked to.
const GRACE_PERIOD: Duration = Duration::from_secs(2);
const STACK: usize = 64 << 10;
/// The most bytes of its output that are taken at once, and told when it fails.
const LINE_MAX: u64 = 1000;
const COMPLAINT_MAX: usize = 8 << 10;
/// The first descriptor that is no standard stream.
const FIRST: RawFd = 3;

/// Lines that begin so are of no interest: it says them when all is well.
pub type Chatter = &'static [&'static str];

/// One that starts, and ends with this.
pub struct Helper {
    program: &'static str,
    chatter: Chatter,
    /// None once somebody else waits for it.
    child: Option<Child>,
    stderr: Option<ChildStderr>,
}

/// One that works, but that nobody waits for yet.
pub struct Ready {
    helper: Helper,
    socket: UnixStream,
    needed_by: String,
}

impl Ready {
    /// A helper that has the other end of the socket, and what needs it, for messages.
    pub fn new(helper: Helper, socket: UnixStream, needed_by: impl Into<String>) -> Self {
        Ready {
            helper,
            socket,
            needed_by: needed_by.into(),
        }
    }

    /// Waits for its end, and passes on what it says, each on a thread. If it fails,
    /// that is told of.
    pub fn watch(self, tell: impl FnOnce(String) + Send + 'static) -> io::Result<Running> {
        let (program, needed_by) = (self.helper.program, self.needed_by);
        self.helper.watch(self.socket, move |status| {
            if let Some(how) = failure(status) {
                tell(format!("{needed_by}: {program} {how}"));
            }
        })
    }
}

/// One that runs, and ends with this.
pub struct Running {
    socket: UnixStream,
    life: Arc<Life>,
}

/// What a program says on standard output, up to [`COMPLAINT_MAX`] bytes. One that takes
/// longer than a time is ended, as is the wait by a signal.
pub fn output(
    mut command: Command,
    what: &str,
    timeout: Duration,
    signals: &StartSignals,
) -> Result<Vec<u8>, Failure> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    end_with_us(&mut command);
    let mut child = command.spawn().or_host(what)?;
    let deadline = Instant::now() + timeout;
    let mut said = Vec::new();
    let read = (|| {
        let Some(stdout) = &mut child.stdout else {
            return Ok(());
        };
        let mut chunk = [0; 1024];
        while said.len() < COMPLAINT_MAX {
            let left = deadline.saturating_duration_since(Instant::now());
            if !signals.wait(stdout.as_fd(), left)? {
                let seconds = timeout.as_secs();
                return Err(Failure::host(format!(
                    "{what}: says nothing for {seconds} s"
                )));
            }
            let len = stdout.read(&mut chunk).or_host(what)?;
            if len == 0 {
                break;
            }
            said.extend_from_slice(chunk.get(..len).unwrap_or_default());
        }
        Ok(())
    })();
    // It has nothing to do any more.
    let _ = child.kill();
    let _ = child.wait();
    read.map(|()| said)
}

/// A program beside a VM, which has nothing of the user's: no environment but the search
/// path, and no descriptors but the standard streams and those that it is given after this.
pub fn command(program: &Path) -> io::Result<Command> {
    let open = sandbox::descriptors()?;
    let mut command = Command::new(program);
    command.env_clear();
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    let prepare = move || {
        close_by_exec(&open);
        Ok(())
    };
    // SAFETY: what runs between fork and exec are system calls.
    unsafe { command.pre_exec(prepare) };
    Ok(command)
}

/// Starts a program in a session of its own, with nothing open but standard streams.
pub fn leave(command: &mut Command) -> io::Result<()> {
    let open = sandbox::descriptors()?;
    let prepare = move || {
        // Signals may be blocked here, as this waits for it.
        unblock_signals()?;
        // SAFETY: has no preconditions.
        unsafe { libc::setsid() };
        close_by_exec(&open);
        Ok(())
    };
    // SAFETY: what runs between fork and exec are system calls.
    unsafe { command.pre_exec(prepare) };
    Ok(())
}

/// Has exec close all descriptors but the standard streams. Those that are known are told
/// one by one, as kernels before 5.11 know no other way; what was opened since then has that
/// flag anyway.
fn close_by_exec(known: &[RawFd]) {
    let how = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: numbers; nothing is closed yet.
    if unsafe { libc::syscall(libc::SYS_close_range, FIRST, u32::MAX, how) } == 0 {
        return;
    }
    close_each_by_exec(known);
}

fn close_each_by_exec(known: &[RawFd]) {
    for &fd in known.iter().filter(|&&fd| fd >= FIRST) {
        // SAFETY: numbers; one that is closed by now is refused.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// Gives a descriptor to a program, which starts when there is something to read from
/// it if it has a name to wait by.
pub fn give(command: &mut Command, fd: RawFd, waits: Option<&'static CStr>) {
    let prepare = move || {
        inherit(fd)?;
        waits.map_or(Ok(()), |name| await_use(fd, name))
    };
    // SAFETY: what runs between fork and exec are system calls.
    unsafe { command.pre_exec(prepare) };
}

/// Waits until there is something to read from a socket, and lets the program that
/// follows read it; ends the process if there will never be. To be called between
/// fork and exec: whoever started the process goes on meanwhile.
pub fn await_use(socket: RawFd, name: &CStr) -> io::Result<()> {
    let close = |first: RawFd, last: libc::c_uint| {
        // SAFETY: numbers; nobody uses these descriptors any more.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) == 0 }
    };
    // What is open is the VM's, which may be over sooner: locks, sockets. One of them
    // is what the standard library waits at for the outcome of exec.
    let before = (socket - 1).cast_unsigned();
    if !((socket <= FIRST || close(FIRST, before)) && close(socket + 1, libc::c_uint::MAX)) {
        return Ok(()); // an old kernel: the program starts now
    }
    // SAFETY: a string that lives until the call returns.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    let mut byte = 0u8;
    loop {
        // SAFETY: writes at most one byte to a live one.
        let len = unsafe { libc::recv(socket, (&raw mut byte).cast(), 1, libc::MSG_PEEK) };
        if len > 0 {
            return Ok(());
        }
        let interrupted = io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
        if len == 0 || !interrupted {
            // SAFETY: runs nothing of this process.
            unsafe { libc::_exit(0) };
        }
    }
}

impl Helper {
    /// Starts it, in a process group of its own: Ctrl-C is for the VM, which ends it.
    pub fn spawn(
        program: &'static str,
        chatter: Chatter,
        mut command: Command,
    ) -> io::Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        // SAFETY: what runs between fork and exec are system calls.
        unsafe { command.pre_exec(unblock_signals) };
        let mut child = command.spawn()?;
        Ok(Helper {
            program,
            chatter,
            stderr: child.stderr.take(),
            child: Some(child),
        })
    }

    /// Ends it, as it did not start: returns why.
    pub fn complaint(&mut self) -> String {
        self.kill();
        let mut text = Vec::new();
        let deadline = Instant::now() + GRACE_PERIOD;
        // A child of its own in another session may have it open for longer.
        while let Some(stderr) = &mut self.stderr
            && text.len() < COMPLAINT_MAX
        {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            let mut chunk = [0; 1024];
            match ready(stderr.as_raw_fd(), libc::POLLIN, left).then(|| stderr.read(&mut chunk)) {
                Some(Ok(len @ 1..)) => text.extend(chunk.iter().take(len)),
                _ => break,
            }
        }
        self.stderr = None;
        let text = String::from_utf8_lossy(&text);
        let said: Vec<_> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !is_chatter(self.chatter, line))
            .collect();
        match said.is_empty() {
            true => "ended without a word".to_owned(),
            false => said.join("; "),
        }
    }

    fn kill(&self) {
        if let Some(child) = &self.child {
            // SAFETY: numbers; the group is still its own, as it was not waited for.
            unsafe { libc::kill(-child.id().cast_signed(), libc::SIGKILL) };
        }
    }

    fn watch(
        mut self,
        socket: UnixStream,
        tell: impl FnOnce(ExitStatus) + Send + 'static,
    ) -> io::Result<Running> {
        let (program, chatter, stderr) = (self.program, self.chatter, self.stderr.take());
        let mut child = self.child.take().ok_or(io::ErrorKind::NotFound)?;
        let life = Arc::new(Life {
            pid: child.id().cast_signed(),
            over: Mutex::new(false),
            ended: Condvar::new(),
        });
        let its = life.clone();
        let thread = || {
            let builder = thread::Builder::new().name(program.to_owned());
            builder.stack_size(STACK)
        };
        // Its socket tells the guest.
        thread().spawn(move || match its.follow(&mut child) {
            Ok(status) => {
                log::info!("{program}: ended: {status}");
                tell(status);
            }
            Err(error) => log::warn!("{program}: {error}"),
        })?;
        if let Some(stderr) = stderr {
            // Its children may have it, too.
            thread().spawn(move || listen(program, chatter, stderr))?;
        }
        Ok(Running { socket, life })
    }
}

/// How it failed. One that is not needed any more ends by itself, without a failure.
fn failure(status: ExitStatus) -> Option<String> {
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(code), _) => Some(format!("ended with status {code}")),
        (None, Some(signal)) => Some(format!("was ended by signal {signal}")),
        (None, None) => Some("ended".to_owned()),
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.kill();
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }
}

impl Running {
    /// Ends it at once, and waits until it has ended.
    pub fn end(&self) {
        self.life.kill();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        // What it holds is free for the next one then.
        if !self.life.wait() {
            self.life.kill();
        }
    }
}

/// Whether a process and its group live.
struct Life {
    /// Nobody else's until it is waited for, and so until it is over.
    pid: libc::pid_t,
    over: Mutex<bool>,
    ended: Condvar,
}

impl Life {
    /// Waits for its end, which is that of its own children, too.
    fn follow(&self, child: &mut Child) -> io::Result<ExitStatus> {
        // SAFETY: all zeroes are a value of it.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let how = libc::WEXITED | libc::WNOWAIT;
        // SAFETY: fills a live structure.
        while unsafe { libc::waitid(libc::P_PID, child.id(), &mut info, how) } < 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
        let mut over = lock(&self.over);
        self.signal();
        *over = true;
        let status = child.wait();
        self.ended.notify_all();
        status
    }

    fn signal(&self) {
        // SAFETY: numbers; the group is still its own, as it was not waited for.
        unsafe { libc::kill(-self.pid, libc::SIGKILL) };
    }

    fn kill(&self) {
        let over = lock(&self.over);
        if !*over {
            self.signal();
            drop(over);
            self.wait();
        }
    }

    /// False if it did not end.
    fn wait(&self) -> bool {
        let over = lock(&self.over);
        let waited = self
            .ended
            .wait_timeout_while(over, GRACE_PERIOD, |over| !*over)
            .unwrap_or_else(PoisonError::into_inner);
        *waited.0
    }
}

fn is_chatter(chatter: Chatter, line: &str) -> bool {
    chatter.iter().any(|known| line.starts_with(known))
}

/// Passes on what it says, to its end.
fn listen(program: &str, chatter: Chatter, stderr: ChildStderr) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut stderr).take(LINE_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&line);
        let line = line.trim();
        if !line.is_empty() && !is_chatter(chatter, line) {
            log::warn!("{program}: {line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    fn shell(script: &str) -> Helper {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Helper::spawn("sh", &["fine"], command).unwrap()
    }

    fn alive(group: i32) -> bool {
        // SAFETY: numbers.
        unsafe { libc::kill(-group, 0) == 0 }
    }

    /// Also where the kernel has no call for all of them.
    #[test]
    fn what_was_inherited_stays_behind() {
        for close in [close_by_exec, close_each_by_exec] {
            let (read, _write) = io::pipe().unwrap();
            let fd = read.as_raw_fd();
            let mut command = Command::new("sh");
            let script = format!("echo >&2; test -e /dev/fd/{fd} && echo open");
            command.args(["-c", &script]).stderr(Stdio::null());
            let prepare = move || {
                inherit(fd)?;
                close(&[0, 1, 2, fd]);
                Ok(())
            };
            // SAFETY: what runs between fork and exec are system calls.
            unsafe { command.pre_exec(prepare) };
            assert_eq!(command.output().unwrap().stdout, b"");
        }
    }

    #[test]
    fn nothing_of_the_user_s_is_for_a_helper() {
        // What a shell passes on: `mayfly run … 3<folder`.
        let (inherited, _writer) = io::pipe().unwrap();
        inherit(inherited.as_raw_fd()).unwrap();
        let (given, _other) = io::pipe().unwrap();
        let mut command = command(Path::new("/bin/sh")).unwrap();
        give(&mut command, given.as_raw_fd(), None);
        let script = "env; for fd in /proc/self/fd/*; do [ ! -e $fd ] || readlink $fd; done";
        let output = command.args(["-c", script]).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let name = |fd: RawFd| fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        let has = |fd| said.contains(name(fd).to_str().unwrap());
        assert!(
            has(given.as_raw_fd()) && !has(inherited.as_raw_fd()),
            "{said}"
        );
        let own = |line: &&str| {
            ["PATH=", "PWD=", "_=", "OLDPWD=", "SHLVL="]
                .iter()
                .any(|it| line.starts_with(it))
        };
        let foreign = said.lines().filter(|line| line.contains('=') && !own(line));
        assert_eq!(foreign.collect::<Vec<_>>(), [""; 0]);
        assert!(std::env::vars_os().count() > 1);
    }

    #[test]
    fn one_that_does_not_start_says_why() {
        let mut helper = shell("echo fine so far >&2; echo wrong >&2; echo very >&2; exit 1");
        let stat = format!("/proc/{}/stat", helper.child.as_ref().unwrap().id());
        while !std::fs::read_to_string(&stat).unwrap().contains(") Z") {
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(helper.complaint(), "wrong; very");
        let mut helper = shell("exec sleep 1000");
        assert_eq!(helper.complaint(), "ended without a word");
    }

    /// A program that copies what comes from a socket to its standard error.
    fn reader(theirs: UnixStream) -> Helper {
        let fd = theirs.as_raw_fd();
        // Another shell may know descriptors of one digit only.
        let mut command = Command::new("bash");
        command.args(["-c", &format!("cat <&{fd} >&2")]);
        give(&mut command, fd, Some(c"waits"));
        Helper::spawn("sh", &[], command).unwrap()
    }

    fn name(helper: &Helper) -> String {
        let pid = helper.child.as_ref().unwrap().id();
        std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
    }

    #[test]
    fn one_that_is_not_used_does_not_start() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut pipe, writer) = io::pipe().unwrap();
        let mut helper = reader(theirs);
        while name(&helper) != "waits\n" {
            thread::sleep(Duration::from_millis(10));
        }
        // It has nothing open that is ours.
        drop(writer);
        assert_eq!(pipe.read(&mut [0]).unwrap(), 0);
        drop(ours);
        let status = helper.child.as_mut().unwrap().wait().unwrap();
        assert_eq!(status.code(), Some(0));
    }

    #[test]
    fn one_that_is_used_reads_all_there_is() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut helper = reader(theirs);
        ours.write_all(b"all of it\n").unwrap();
        drop(ours);
        let mut said = String::new();
        let mut stderr = helper.stderr.take().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert_eq!(said, "all of it\n");
    }

    #[test]
    fn one_that_ends_takes_its_children_along() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let helper = shell("sleep 1000 & exit 0");
        let group = helper.child.as_ref().unwrap().id().cast_signed();
        let running = helper.watch(ours, |_| ()).unwrap();
        assert!(running.life.wait());
        let begun = Instant::now();
        // Whoever adopted it may take a while to notice.
        while alive(group) && begun.elapsed() < GRACE_PERIOD {
            thread::sleep(Duration::from_millis(10));
        }
        assert!(!alive(group));
    }

    #[test]
    fn one_that_fails_is_told_of() {
        for (script, expected) in [
            ("exit 3", Some("network: sh ended with status 3")),
            ("kill -9 $$", Some("network: sh was ended by signal 9")),
            ("exit 0", None),
        ] {
            let (ours, _theirs) = UnixStream::pair().unwrap();
            let (tell, told) = std::sync::mpsc::channel();
            let ready = Ready::new(shell(script), ours, "network");
            let running = ready.watch(move |problem| tell.send(problem).unwrap());
            // Who would tell of it is gone when it is not.
            assert_eq!(told.recv().ok().as_deref(), expected, "{script}");
            drop(running.unwrap());
        }
    }

    #[test]
    fn one_that_does_not_end_is_ended() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let running = shell("sleep 1000").watch(ours, |_| ()).unwrap();
        let life = running.life.clone();
        running.end();
        assert!(*lock(&life.over));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let running = shell("exec sleep 1000").watch(ours, |_| ()).unwrap();
        let life = running.life.clone();
        drop(running);
        assert!(*lock(&life.over));
    }
}
