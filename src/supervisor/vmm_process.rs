//! The VMM process as its supervisor knows it: how it is stopped, and waited for.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_devices::bus::lock;
use mayfly_devices::poll::{entry, poll};
use mayfly_sandbox::Child;

use crate::link::{Link, ToVmm};

/// How long a VMM process that was told to stop may take before it is killed.
pub(super) const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the kernel may take to end a process that was killed.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(10);
const DOES_NOT_END: &str = "it was killed, and does not end: it waits for I/O of the host's";

/// The process, and the link to it.
pub(super) struct VmmProcess {
    pub link: Link,
    pub child: Mutex<Child>,
    /// Readable when it has ended.
    pub exited: OwnedFd,
    /// It was told to stop, and is killed if it does not.
    pub stopping: AtomicBool,
    /// The guest runs: there is something that may end in order.
    pub runs: AtomicBool,
    /// How long it may take to stop.
    pub stop_timeout: Duration,
}

impl VmmProcess {
    /// Kills it; one that has ended is left alone.
    pub fn kill(&self) {
        let _ = lock(&self.child).kill();
    }

    /// Waits for its end, which comes soon after it was told to stop, or was killed: unless it
    /// waits for I/O of the host's that does not come. Then this fails after a time.
    pub fn wait(&self, timeout: Duration) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        let mut exited = [entry(self.exited.as_raw_fd(), libc::POLLIN)];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
            match poll(&mut exited, left) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) if Instant::now() < deadline => {}
                Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, DOES_NOT_END)),
                _ => return lock(&self.child).wait(),
            }
        }
    }
}

/// Stops a VM, from any thread.
#[derive(Clone)]
pub struct StopHandle(pub(super) Arc<VmmProcess>);

impl StopHandle {
    /// Stops the VM, whatever its guest does.
    pub fn stop(&self) {
        let _ = self.0.link.try_send(&ToVmm::End);
        self.kill_after_timeout();
    }

    /// Kills the VMM process if it does not end soon, as it was told to, or said it
    /// would: a guest may have taken it over.
    pub(super) fn kill_after_timeout(&self) {
        if !self.0.runs.load(Ordering::Relaxed) {
            return self.0.kill();
        }
        if self.0.stopping.swap(true, Ordering::Relaxed) {
            return;
        }
        let process = self.0.clone();
        let wait_and_kill = move || {
            thread::sleep(process.stop_timeout);
            process.kill();
        };
        if thread::Builder::new().spawn(wait_and_kill).is_err() {
            self.0.kill();
        }
    }
}
