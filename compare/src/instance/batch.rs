//! Instances that run at the same time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use mayfly_process::signals::SignalFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, wait};

use super::super::model::Mark;
use super::super::processes::{descendants, kill_descendants};
use super::super::undo::{run_quietly, undo};
use super::watch::Watch;
use super::{Instance, Launch, SIGNALLED, Sign, now};

/// How long an instance that gets SIGTERM may take to end.
const GRACE_PERIOD: Duration = Duration::from_secs(10);
/// The time that what a launcher leaves running may take to end after it.
const LINGER: Duration = Duration::from_secs(10);

/// Why a batch did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// The user, or our other half, wants an end.
    #[error("interrupted")]
    Interrupted,
    /// It took too long.
    #[error("not within {} s", .0.as_secs())]
    Late(Duration),
    /// The host.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Instances that run at the same time.
#[derive(Default)]
pub struct Batch {
    /// In the order of their launch.
    pub instances: Vec<Instance>,
    watch: Option<Watch>,
}

/// The events that end a comparison early.
pub struct Ends {
    /// SIGINT, SIGTERM, SIGHUP; and SIGCHLD, as launchers end.
    pub signals: SignalFd,
    /// Is closed when our other half is gone.
    pub other_half: OwnedFd,
    /// Who stays when all instances ended (see `Engine::residents`).
    pub residents: Vec<Pid>,
}

impl Ends {
    /// Nobody else is left.
    fn only_residents(&self) -> bool {
        // Most comparisons have none, and `/proc` is slow.
        let residents = &self.residents;
        !residents.is_empty()
            && descendants(getpid())
                .iter()
                .all(|it| residents.contains(it))
    }
}

impl Batch {
    /// Launches one more.
    pub fn launch(&mut self, launch: Launch) -> io::Result<()> {
        let watch = match &mut self.watch {
            Some(watch) => watch,
            none => none.insert(Watch::new()?),
        };
        self.instances.push(Instance::launch(launch, watch)?);
        Ok(())
    }

    /// Watches until all are as far as that.
    pub fn until(
        &mut self,
        ends: &Ends,
        timeout: Duration,
        reached: impl Fn(&Instance) -> bool,
    ) -> Result<(), BatchError> {
        let deadline = now() + u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX / 2);
        while !self.instances.iter().all(&reached) {
            let left = deadline.saturating_sub(now());
            if left == 0 {
                return Err(BatchError::Late(timeout));
            }
            self.turn(ends, Duration::from_nanos(left))?;
        }
        Ok(())
    }

    /// Watches for a while.
    pub fn rest(&mut self, ends: &Ends, time: Duration) -> Result<(), BatchError> {
        match self.until(ends, time, |_| false) {
            Err(BatchError::Late(_)) => Ok(()),
            other => other,
        }
    }

    /// The launches of its instances.
    pub fn launches(&self) -> impl Iterator<Item = &Launch> {
        self.instances.iter().map(|it| &it.launch)
    }

    /// Waits for one thing to happen, and takes it.
    pub fn turn(&mut self, ends: &Ends, timeout: Duration) -> Result<(), BatchError> {
        #[derive(Clone, Copy)]
        enum What {
            Output,
            Errors,
            Sign(usize),
        }
        let mut whats = Vec::new();
        let mut polls = vec![
            PollFd::new(&ends.signals, PollFlags::IN),
            PollFd::new(&ends.other_half, PollFlags::IN),
        ];
        let files = self.watch.as_ref();
        polls.extend(files.map(|watch| PollFd::new(watch, PollFlags::IN)));
        let first = polls.len();
        for (index, instance) in self.instances.iter().enumerate() {
            let mut add = |fd, what| {
                polls.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
                whats.push((index, what));
            };
            if let Some(output) = &instance.output {
                add(output.as_fd(), What::Output);
            }
            if let Some(errors) = &instance.errors {
                add(errors.as_fd(), What::Errors);
            }
            for (place, sign) in instance.launch.signs.iter().enumerate() {
                if let Sign::Byte(fd, _) | Sign::Lines(fd) = sign {
                    add(fd.as_fd(), What::Sign(place));
                }
            }
        }
        let timeout = Timespec::try_from(timeout).ok();
        match poll(&mut polls, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(BatchError::Io(error.into())),
        }
        let at = now();
        let ready: Vec<bool> = polls
            .iter()
            .map(|poll| !poll.revents().is_empty())
            .collect();
        if ready.get(1) == Some(&true) {
            return Err(BatchError::Interrupted);
        }
        if let Some(watch) = &mut self.watch
            && ready.get(2) == Some(&true)
        {
            let appeared = watch.take();
            for instance in &mut self.instances {
                instance.take_files(watch, &appeared, at);
            }
        }
        for (&(index, what), _) in whats
            .iter()
            .zip(ready.iter().skip(first))
            .filter(|(_, ready)| **ready)
        {
            let Some(instance) = self.instances.get_mut(index) else {
                continue;
            };
            match what {
                What::Output => instance.take_output(at),
                What::Errors => instance.take_errors(),
                What::Sign(place) => {
                    if !instance.take_sign(place, at) {
                        // Nothing more comes of it.
                        instance.launch.signs.remove(place);
                        break;
                    }
                }
            }
        }
        if ready.first() == Some(&true) {
            while let Some(signal) = ends.signals.next_signal() {
                if signal != libc::SIGCHLD {
                    return Err(BatchError::Interrupted);
                }
            }
            self.reap(ends, at);
        }
        Ok(())
    }

    /// Takes the ends of launchers, and of those that they left to us. False if there is
    /// nobody left.
    fn reap(&mut self, ends: &Ends, at: u64) -> bool {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(None) => return !ends.only_residents(),
                Ok(Some((pid, status))) => {
                    let signal = || status.terminating_signal().map(|it| SIGNALLED + it);
                    let code = status.exit_status().or_else(signal);
                    if let Some(instance) = self.instances.iter_mut().find(|it| it.pid == pid) {
                        // What it said before is there.
                        instance.take_rest(at);
                        instance.status = code;
                        instance.take_mayfly_record();
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Waits until all launchers ended and nobody is left, which is the last mark.
    pub fn wait_for_end(&mut self, ends: &Ends, timeout: Duration) -> Result<(), BatchError> {
        self.until(ends, timeout, Instance::ended)?;
        let deadline = now() + u64::try_from(LINGER.as_nanos()).unwrap_or(u64::MAX / 2);
        while self.reap(ends, now()) {
            let left = deadline.saturating_sub(now());
            if left == 0 {
                return Err(BatchError::Late(LINGER));
            }
            self.turn(ends, Duration::from_nanos(left))?;
        }
        let at = now();
        for instance in &mut self.instances {
            instance.take_rest(at);
            instance.mark(Mark::Gone, at);
        }
        Ok(())
    }

    /// Asks all to end that have not.
    pub fn ask_to_end(&self) {
        for instance in self.instances.iter().filter(|it| !it.ended()) {
            match instance.launch.stop.as_deref() {
                Some([program, arguments @ ..]) => drop(run_quietly(program, arguments)),
                _ => drop(kill_process(instance.pid, Signal::TERM)),
            }
        }
    }

    /// Ends all, whatever they do, and removes what they leave.
    pub fn end(mut self, ends: &Ends) {
        self.ask_to_end();
        let orderly = self.wait_for_end(ends, GRACE_PERIOD);
        if orderly.is_err() {
            self.end_by_force(ends);
        }
    }

    fn end_by_force(&mut self, ends: &Ends) {
        kill_descendants(&ends.residents);
        self.instances.iter().for_each(|it| undo(&it.launch.undo));
        kill_descendants(&ends.residents);
        self.reap(ends, now());
    }

    /// Ends by force those that did not come to their end, as a failure.
    pub fn abandon(mut self, ends: &Ends) -> Vec<Instance> {
        self.end_by_force(ends);
        let at = now();
        for instance in &mut self.instances {
            instance.take_rest(at);
        }
        self.instances
    }
}
