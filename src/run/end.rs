//! Ending VMs from outside.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use mayfly_protocol::agent::HostMessage;
use rustix::process::Signal;

use super::agent::Agent;
use super::process::Process;
use super::record::{Record, State, VmDir};
use crate::control::{Client, Command, Folder};
use crate::failure::{Failure, OrFail};

/// What a VM whose supervisor process was killed counts as.
pub const STATUS_KILLED: u8 = 137;
/// The time that a guest has to answer, and a VM to end when it was told to.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// What is left of a time.
#[derive(Clone, Copy)]
struct Deadline(Option<Instant>);

impl Deadline {
    fn after(time: Duration) -> Self {
        // One that is beyond all clocks never comes.
        Deadline(Instant::now().checked_add(time))
    }

    fn left(self) -> Duration {
        self.0.map_or(Duration::MAX, |end| {
            end.saturating_duration_since(Instant::now())
        })
    }
}

/// Asks a VM's command to end, and ends the VM when its time is over.
pub fn stop(vm_dir: &VmDir, signal: Option<i32>, time: Duration) -> Result<(), Failure> {
    if vm_dir.state() == State::Ended {
        return Ok(());
    }
    let deadline = Deadline::after(time);
    let record = vm_dir.record()?;
    wake(vm_dir, &record, deadline.left())?;
    let timeout = deadline.left().min(END_TIMEOUT);
    let signal = signal.unwrap_or(record.stop_signal);
    let told = signal_main(vm_dir, signal, timeout);
    if told.is_ok() && wait(vm_dir, deadline.left())? {
        return Ok(());
    }
    force(vm_dir)
}

/// Signals a VM's command; one that can't be reached is ended, if that is what
/// is wanted.
pub fn kill(vm_dir: &VmDir, signal: i32) -> Result<(), Failure> {
    if vm_dir.state() == State::Ended {
        return Err(Failure::config(format!("{}: has ended", vm_dir.name())));
    }
    if signal != libc::SIGKILL {
        vm_dir.need_unpaused()?;
        return signal_main(vm_dir, signal, END_TIMEOUT);
    }
    let deadline = Deadline::after(END_TIMEOUT);
    wake(vm_dir, &vm_dir.record()?, deadline.left())?;
    let told = signal_main(vm_dir, signal, deadline.left());
    match told.is_ok() && wait(vm_dir, deadline.left())? {
        true => Ok(()),
        false => force(vm_dir),
    }
}

/// Lets go on what could not hear that it is to end: processes that a signal has
/// stopped, and a guest that is paused.
fn wake(vm_dir: &VmDir, record: &Record, time: Duration) -> Result<(), Failure> {
    continue_processes(record);
    if vm_dir.status().paused {
        let socket = Folder::locate().socket(&vm_dir.name());
        let resume = move || Client::connect(&socket, END_TIMEOUT)?.ask(&Command::Resume {});
        // One that does not go on is ended by force.
        within(time.min(END_TIMEOUT), resume)?;
    }
    Ok(())
}

/// Continues a VM's processes: its supervisor's, and those that it started.
fn continue_processes(record: &Record) {
    let Some(supervisor) = Process::find(record.pid, record.pid_started) else {
        return;
    };
    let children = supervisor.children();
    for process in [supervisor].iter().chain(&children) {
        // Nothing happens to one that is not stopped.
        let _ = process.signal(Signal::CONT);
    }
}

/// Its guest may say anything, or nothing.
fn signal_main(vm_dir: &VmDir, signal: i32, time: Duration) -> Result<(), Failure> {
    let socket = vm_dir.vsock();
    let ask = move || Agent::connect(&socket)?.ask(&HostMessage::SignalMain(signal));
    match within(time, ask)? {
        Some(result) => result.or_host(vm_dir.name()),
        None => Err(Failure::host(format!(
            "{}: its guest does not answer",
            vm_dir.name()
        ))),
    }
}

/// Does something for a time, and no longer: then its thread ends with this process.
fn within<T: Send + 'static>(
    time: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>, Failure> {
    let (told, result) = mpsc::channel();
    thread::Builder::new()
        .spawn(move || drop(told.send(work())))
        .or_host("starting a thread")?;
    Ok(result.recv_timeout(time).ok())
}

/// Ends a VM, whatever its guest does; its processes, if they do not answer.
fn force(vm_dir: &VmDir) -> Result<(), Failure> {
    let deadline = Deadline::after(END_TIMEOUT);
    let record = vm_dir.record()?;
    continue_processes(&record);
    let socket = Folder::locate().socket(&vm_dir.name());
    let end =
        move || Client::connect(&socket, END_TIMEOUT)?.ask(&Command::Shutdown { deadline: 0 });
    let told = within(deadline.left(), end)?;
    if matches!(told, Some(Ok(_))) && wait(vm_dir, deadline.left())? {
        return Ok(());
    }
    // Who removes a VM has its lock, too: then there is none to be killed, and another process
    // may have the number.
    if let State::Running = vm_dir.state()
        && let Some(supervisor) = Process::find(record.pid, record.pid_started)
    {
        supervisor.signal(Signal::KILL).or_host(vm_dir.name())?;
    }
    vm_dir.wait().map(drop)
}

/// Waits for the end of a VM's process, but not for ever; true if it came.
fn wait(vm_dir: &VmDir, time: Duration) -> Result<bool, Failure> {
    let vm_dir = vm_dir.clone();
    match within(time, move || vm_dir.wait())? {
        Some(result) => result.map(|_| true),
        None => Ok(false),
    }
}
