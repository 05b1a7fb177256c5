//! Ending VMs from outside.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use mayfly_guest::protocol::HostMessage;
use rustix::process::{Pid, Signal, kill_process};

use super::agent::Agent;
use super::record::{Place, State};
use crate::control::{Client, Command, Folder};
use crate::failure::{Failure, OrFail};

/// What a VM whose process was killed counts as.
pub const STATUS_KILLED: u8 = 137;
/// So long a machine has to end when it was told to.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks a VM's command to end, and ends the VM when its time is over.
pub fn stop(place: &Place, time: Duration) -> Result<(), Failure> {
    if place.state() == State::Ended {
        return Ok(());
    }
    let signal = place.record()?.stop_signal;
    let told = signal_main(place, signal);
    if told.is_ok() && wait(place, time)? {
        return Ok(());
    }
    force(place)
}

/// Signals a VM's command; one that can't be reached is ended, if that is what
/// is wanted.
pub fn kill(place: &Place, signal: i32) -> Result<(), Failure> {
    if place.state() == State::Ended {
        return Err(Failure::config(format!("{}: has ended", place.name())));
    }
    match signal_main(place, signal) {
        Ok(()) if signal != libc::SIGKILL || wait(place, PATIENCE)? => Ok(()),
        Err(failure) if signal != libc::SIGKILL => Err(failure),
        _ => force(place),
    }
}

/// Its guest may say anything, or nothing.
fn signal_main(place: &Place, signal: i32) -> Result<(), Failure> {
    let socket = place.vsock();
    let ask = move || Agent::connect(&socket)?.ask(&HostMessage::SignalMain(signal));
    match within(PATIENCE, ask)? {
        Some(result) => result.or_host(place.name()),
        None => Err(Failure::host(format!(
            "{}: its guest does not answer",
            place.name()
        ))),
    }
}

/// Does something for so long, and no longer: then its thread ends with this process.
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

/// Ends a VM, whatever its guest does; its process, if it does not answer.
fn force(place: &Place) -> Result<(), Failure> {
    let socket = Folder::locate().socket(&place.name());
    let end = move || Client::connect(&socket, PATIENCE)?.ask(&Command::Shutdown { deadline: 0 });
    let told = within(PATIENCE, end)?;
    if matches!(told, Some(Ok(_))) && wait(place, PATIENCE)? {
        return Ok(());
    }
    let record = place.record()?;
    // The lock is held: the number is still that process's.
    let pid = i32::try_from(record.pid).ok().and_then(Pid::from_raw);
    if let (State::Running, Some(pid)) = (place.state(), pid) {
        kill_process(pid, Signal::KILL).or_host(place.name())?;
    }
    place.wait().map(drop)
}

/// Waits for the end of a VM's process, but not for ever; true if it came.
fn wait(place: &Place, time: Duration) -> Result<bool, Failure> {
    let place = place.clone();
    match within(time, move || place.wait())? {
        Some(result) => result.map(|_| true),
        None => Ok(false),
    }
}
