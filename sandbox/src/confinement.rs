//! The closed sandbox, and the threads in it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::credentials::{self, Ids};
use super::landlocked::landlock;
use super::layers::{Layer, Report, Status};
use super::policy::Mode;
use super::role::Role;
use super::seccomp;

/// A closed sandbox. Every thread in it confines itself before the guest runs.
#[derive(Clone, Debug)]
pub struct ThreadConfinement(Arc<Closed>);

#[derive(Debug)]
struct Closed {
    mode: Mode,
    ids: Option<Ids>,
    report: Report,
    barrier: ConfinementBarrier,
}

impl ThreadConfinement {
    /// Lets the threads in that the barrier keeps; none, if these were sent home before.
    pub(super) fn new(
        mode: Mode,
        ids: Option<Ids>,
        report: Report,
        barrier: ConfinementBarrier,
    ) -> Option<Self> {
        let closed = Closed {
            mode,
            ids,
            report,
            barrier: barrier.clone(),
        };
        let confinement = ThreadConfinement(Arc::new(closed));
        barrier
            .open(Wait::Closed(confinement.clone()))
            .then_some(confinement)
    }

    /// Confines the calling thread to what its role needs, for good.
    pub fn confine(&self, role: Role) -> io::Result<()> {
        let Closed {
            mode, ids, report, ..
        } = &*self.0;
        if *mode == Mode::Off {
            return Ok(());
        }
        // What a thread has is its own; one that started in the closed sandbox has nothing.
        if !credentials::has_no_new_privileges() {
            if let Some(ids) = ids {
                credentials::become_user(*ids)?;
            }
            credentials::drop_capabilities()?;
            credentials::no_new_privileges()?;
            if report.get(Layer::Landlock) == Some(&Status::Active) {
                landlock().map_err(io::Error::other)?;
            }
        }
        match report.get(Layer::Seccomp) {
            Some(Status::Active) => seccomp::confine(role),
            _ => Ok(()),
        }
    }

    /// Waits until the threads that the barrier keeps have confined themselves, or ended.
    pub fn settle(&self) {
        let barrier = &self.0.barrier;
        let state = barrier.lock();
        let waiting = |state: &mut State| state.waiting > 0;
        let waited = barrier.0.changed.wait_while(state, waiting);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// How the layers fare. The cgroup is the supervisor's to tell.
    pub fn report(&self) -> Report {
        self.0.report.clone()
    }
}

/// What threads that start before the sandbox closes wait at.
#[derive(Clone, Debug, Default)]
pub struct ConfinementBarrier(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    wait: Wait,
    /// The number of threads that are not confined yet.
    waiting: usize,
}

/// What threads at the barrier wait for.
#[derive(Clone, Debug, Default)]
enum Wait {
    /// The sandbox is not closed yet.
    #[default]
    Open,
    /// It is closed, and they are to confine themselves.
    Closed(ThreadConfinement),
    /// It will never be: no guest will run, and they have nothing to do.
    GivenUp,
}

/// A thread's place at the barrier; to be made before the thread is started.
#[derive(Debug)]
pub struct Pending(ConfinementBarrier);

impl ConfinementBarrier {
    fn lock(&self) -> MutexGuard<'_, State> {
        let state = self.0.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the wait, unless it is over; true if this did.
    fn open(&self, to: Wait) -> bool {
        let mut state = self.lock();
        let first = matches!(state.wait, Wait::Open);
        if first {
            state.wait = to;
        }
        drop(state);
        self.0.changed.notify_all();
        first
    }

    /// Lets all threads go on that wait, without a sandbox: a VM that can't be built is taken
    /// apart, for which its threads are waited for. Once the sandbox is closed, this does
    /// nothing.
    pub fn give_up(&self) {
        self.open(Wait::GivenUp);
    }

    /// A place for one thread.
    pub fn pending(&self) -> Pending {
        self.lock().waiting += 1;
        Pending(self.clone())
    }
}

impl Pending {
    /// Waits until the sandbox is closed, and confines the calling thread.
    pub fn confine(self, role: Role) -> io::Result<()> {
        let ConfinementBarrier(shared) = &self.0;
        let state = self.0.lock();
        let open = |state: &mut State| matches!(state.wait, Wait::Open);
        let waited = shared.changed.wait_while(state, open);
        let wait = waited.unwrap_or_else(PoisonError::into_inner).wait.clone();
        match wait {
            Wait::Closed(confinement) => confinement.confine(role),
            Wait::Open | Wait::GivenUp => Ok(()),
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
        self.0.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn threads_that_wait_go_on_when_it_is_given_up() {
        let barrier = ConfinementBarrier::default();
        let place = barrier.pending();
        let (sender, confined) = mpsc::channel();
        thread::spawn(move || sender.send(place.confine(Role::Io)));
        barrier.give_up();
        let confined = confined.recv_timeout(Duration::from_secs(10));
        confined.expect("the thread waits on").unwrap();
        // Nothing may run in a sandbox whose threads went on without one.
        assert!(ThreadConfinement::new(Mode::On, None, Report::default(), barrier).is_none());
    }

    #[test]
    fn nobody_gives_up_a_closed_one() {
        let barrier = ConfinementBarrier::default();
        assert!(ThreadConfinement::new(Mode::Off, None, Report::off(), barrier.clone()).is_some());
        barrier.give_up();
        assert!(matches!(barrier.lock().wait, Wait::Closed(_)));
    }
}
