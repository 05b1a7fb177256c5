//! The closed sandbox, and the threads in it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Mode;
use super::close::landlock;
use super::credentials::{self, Ids};
use super::layers::{Layer, Report, Status};
use super::seccomp;

/// What a thread does, and so what it may ask of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The host's side of all devices. It starts no thread any more.
    EventLoop,
    /// Runs a vCPU, and serves its accesses to registers.
    Vcpu,
    /// Reads and writes a disk.
    Io,
}

impl Role {
    /// All.
    pub const ALL: [Role; 3] = [Role::EventLoop, Role::Vcpu, Role::Io];

    /// What messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Role::EventLoop => "event-loop",
            Role::Vcpu => "vcpu",
            Role::Io => "io",
        }
    }
}

/// A closed sandbox. Every thread in it confines itself before the guest runs.
#[derive(Clone, Debug)]
pub struct Jail(Arc<Closed>);

#[derive(Debug)]
struct Closed {
    mode: Mode,
    ids: Option<Ids>,
    report: Report,
    gate: Gate,
}

impl Jail {
    pub(super) fn new(mode: Mode, ids: Option<Ids>, report: Report, gate: Gate) -> Self {
        let closed = Closed {
            mode,
            ids,
            report,
            gate: gate.clone(),
        };
        let jail = Jail(Arc::new(closed));
        gate.lock().closed = Some(jail.clone());
        gate.0.changed.notify_all();
        jail
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

    /// Waits until the threads that the gate keeps have confined themselves, or ended.
    pub fn settle(&self) {
        let gate = &self.0.gate;
        let state = gate.lock();
        let waiting = |state: &mut State| state.waiting > 0;
        let waited = gate.0.changed.wait_while(state, waiting);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// How the layers fare. The cgroup is the keeper's to tell.
    pub fn report(&self) -> Report {
        self.0.report.clone()
    }
}

/// What threads that start before the sandbox closes wait at.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// It does, once it is closed.
    closed: Option<Jail>,
    /// So many threads are not confined yet.
    waiting: usize,
}

/// A thread's place at the gate; to be made before the thread is started.
#[derive(Debug)]
pub struct Pending(Gate);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        let state = self.0.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
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
        let Gate(shared) = &self.0;
        let state = self.0.lock();
        let open = |state: &mut State| state.closed.is_none();
        let waited = shared.changed.wait_while(state, open);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        let jail = state.closed.clone();
        drop(state);
        jail.map_or(Ok(()), |jail| jail.confine(role))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
        self.0.0.changed.notify_all();
    }
}
