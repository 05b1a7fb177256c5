//! What a machine's vCPUs are to do: run, wait, or end. One party gives
//! orders; the vCPUs' threads look whenever they were kicked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::state::{StateError, StateScope, VcpuState};

/// An order to all vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct State {
    order: Order,
    /// vCPUs that wait.
    parked: usize,
    /// vCPUs that did not end.
    alive: usize,
    /// vCPUs that a non-maskable interrupt is for.
    nmi: Vec<bool>,
    /// vCPUs that are to be saved, and what came of it.
    saves: Option<Saves>,
}

/// A save of all vCPUs, each by its own thread.
#[derive(Debug)]
struct Saves {
    scope: Arc<StateScope>,
    states: Vec<Saved>,
}

/// How far a vCPU's save is.
#[derive(Debug)]
enum Saved {
    Asked,
    Begun,
    Done(Box<Result<VcpuState, StateError>>),
}

/// What a vCPU's thread is to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Enter the guest, after a non-maskable interrupt if so said.
    Run {
        /// Interrupt it first.
        nmi: bool,
    },
    /// Save the vCPU, give the result to [`Gate::saved`], and come back.
    Save(Arc<StateScope>),
    /// End.
    Stop,
}

impl State {
    fn is_asked(&self, index: usize) -> bool {
        let saves = self.saves.as_ref();
        let saved = saves.and_then(|saves| saves.states.get(index));
        matches!(saved, Some(Saved::Asked))
    }

    /// Takes a vCPU's save on, if it is asked for.
    fn begin_save(&mut self, index: usize) -> Option<Arc<StateScope>> {
        let saves = self.saves.as_mut()?;
        let saved = saves.states.get_mut(index)?;
        if !matches!(saved, Saved::Asked) {
            return None;
        }
        *saved = Saved::Begun;
        Some(saves.scope.clone())
    }
}

/// The gate that vCPUs pass on their way to the guest. It starts closed.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Something else than running is asked for: cheap to look at.
    host_event: AtomicBool,
}

impl Gate {
    /// A closed gate for a number of vCPUs.
    pub fn new(cpus: usize) -> Self {
        Gate {
            state: Mutex::new(State {
                order: Order::Pause,
                parked: 0,
                alive: cpus,
                nmi: vec![false; cpus],
                saves: None,
            }),
            changed: Condvar::new(),
            host_event: AtomicBool::new(true),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        let mut state = self.lock();
        if state.order != Order::Stop {
            state.order = order;
        }
        self.host_event.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Lets the vCPUs run.
    pub fn open(&self) {
        self.order(Order::Run);
    }

    /// Keeps vCPUs from entering the guest; those that are in it must be
    /// kicked. Then see [`Gate::closed`].
    pub fn close(&self) {
        self.order(Order::Pause);
    }

    /// Makes the vCPUs end, for good; those in the guest must be kicked.
    pub fn stop(&self) {
        self.order(Order::Stop);
    }

    /// Asks for a non-maskable interrupt on each vCPU; they must be kicked.
    pub fn interrupt(&self) {
        let mut state = self.lock();
        state.nmi.fill(true);
        self.host_event.store(true, Ordering::Release);
    }

    /// Waits until all vCPUs that live wait; false if that takes too long.
    pub fn closed(&self, timeout: Duration) -> bool {
        let running = |state: &mut State| state.parked < state.alive;
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, timeout, running);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Has each vCPU saved by its thread, once the gate is closed. `None` if that takes too
    /// long, or if a vCPU has ended.
    pub fn save(
        &self,
        scope: Arc<StateScope>,
        timeout: Duration,
    ) -> Option<Vec<Result<VcpuState, StateError>>> {
        let mut state = self.lock();
        if state.alive < state.nmi.len() {
            return None;
        }
        let states = state.nmi.iter().map(|_| Saved::Asked).collect();
        state.saves = Some(Saves { scope, states });
        self.changed.notify_all();
        let unfinished = |state: &mut State| {
            let done = |saved: &Saved| matches!(saved, Saved::Done(_));
            let saves = state.saves.as_ref();
            let rest = saves.is_some_and(|saves| !saves.states.iter().all(done));
            rest && state.alive == state.nmi.len()
        };
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, timeout, unfinished)
            .unwrap_or_else(PoisonError::into_inner);
        let saves = state.saves.take()?;
        let result = |saved| match saved {
            Saved::Done(result) => Some(*result),
            Saved::Asked | Saved::Begun => None,
        };
        saves.states.into_iter().map(result).collect()
    }

    /// What came of a vCPU's save.
    pub fn saved(&self, index: usize, result: Result<VcpuState, StateError>) {
        let mut state = self.lock();
        let saves = state.saves.as_mut();
        if let Some(saved @ Saved::Begun) = saves.and_then(|saves| saves.states.get_mut(index)) {
            *saved = Saved::Done(Box::new(result));
            self.changed.notify_all();
        }
    }

    /// There may be an order. False is certain only for what was ordered
    /// before this thread was kicked.
    pub fn host_event(&self) -> bool {
        self.host_event.load(Ordering::Acquire)
    }

    /// Passes, for the vCPU with an index: waits while the gate is closed.
    /// `park` is called before the first wait.
    pub fn pass(&self, index: usize, park: impl FnOnce()) -> Next {
        let mut park = Some(park);
        let mut state = self.lock();
        loop {
            match state.order {
                Order::Stop => return Next::Stop,
                Order::Run => {
                    let nmi = state.nmi.get_mut(index).is_some_and(std::mem::take);
                    if !state.nmi.contains(&true) {
                        self.host_event.store(false, Ordering::Release);
                    }
                    return Next::Run { nmi };
                }
                Order::Pause => {}
            }
            if let Some(park) = park.take() {
                drop(state);
                park();
                state = self.lock();
                continue;
            }
            if let Some(scope) = state.begin_save(index) {
                return Next::Save(scope);
            }
            state.parked += 1;
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| {
                    state.order == Order::Pause && !state.is_asked(index)
                })
                .unwrap_or_else(PoisonError::into_inner);
            state.parked -= 1;
        }
    }

    /// A vCPU ended.
    pub fn ended(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    const TIMEOUT: Duration = Duration::from_secs(20);

    #[test]
    fn vcpus_wait_run_and_stop_as_ordered() {
        let gate = Arc::new(Gate::new(2));
        let threads: Vec<_> = (0..2)
            .map(|index| {
                let gate = gate.clone();
                thread::spawn(move || {
                    let (mut interrupts, mut parks) = (0, 0);
                    loop {
                        if gate.host_event() {
                            match gate.pass(index, || parks += 1) {
                                Next::Stop => break,
                                Next::Save(_) => panic!("nobody asked"),
                                Next::Run { nmi } => interrupts += u32::from(nmi),
                            }
                        }
                        thread::yield_now();
                    }
                    gate.ended();
                    (interrupts, parks)
                })
            })
            .collect();
        assert!(gate.closed(TIMEOUT));
        gate.interrupt();
        gate.open();
        while gate.host_event() {
            thread::yield_now();
        }
        gate.close();
        assert!(gate.closed(TIMEOUT));
        gate.stop();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), (1, 2));
        }
        // Nobody is left to wait for, and nothing opens it again.
        gate.open();
        assert_eq!(gate.pass(0, || ()), Next::Stop);
        assert!(gate.closed(TIMEOUT));
    }

    #[test]
    fn a_vcpu_that_ends_instead_of_being_saved_is_noticed() {
        let kvm = crate::kvm::vm::open();
        let Some(scope) = kvm.ok().and_then(|kvm| StateScope::of(&kvm).ok()) else {
            return;
        };
        let gate = Arc::new(Gate::new(1));
        let vcpu = {
            let gate = gate.clone();
            thread::spawn(move || {
                let next = gate.pass(0, || ());
                gate.ended();
                next
            })
        };
        assert!(gate.closed(TIMEOUT));
        assert!(gate.save(Arc::new(scope.clone()), TIMEOUT).is_none());
        assert_eq!(vcpu.join().unwrap(), Next::Save(Arc::new(scope.clone())));
        assert!(gate.save(Arc::new(scope), TIMEOUT).is_none());
    }

    #[test]
    fn who_does_not_park_is_noticed() {
        let gate = Gate::new(1);
        assert!(!gate.closed(Duration::from_millis(1)));
    }
}
