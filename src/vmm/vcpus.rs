//! A machine's vCPUs and their threads.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::signal::Killable;

use crate::failure::{Failure, OrFail};
use crate::kvm::gate::Gate;
use crate::kvm::state::{StateScope, VcpuState};
use crate::kvm::vcpu::{self, Buses, ExitCounters, Vcpu};

/// Enough for what a vCPU's thread calls.
pub const STACK: usize = 256 << 10;
/// How long a vCPU may take to leave the guest.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A machine's vCPUs, each on a thread of its own; they end with this.
pub struct VcpuControl {
    gate: Arc<Gate>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    exits: Vec<Arc<ExitCounters>>,
}

impl VcpuControl {
    /// Starts the threads; their vCPUs wait.
    pub fn start(
        vcpus: Vec<Vcpu>,
        buses: Buses,
        gate: Arc<Gate>,
        begin: impl Fn() + Send + Sync + 'static,
        tell: impl Fn(vcpu::VcpuEnd) + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let (buses, tell, begin) = (Arc::new(buses), Arc::new(tell), Arc::new(begin));
        let mut threads = Vec::new();
        let exits = vcpus.iter().map(Vcpu::exits).collect();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (its_gate, buses) = (gate.clone(), buses.clone());
            let (begin, tell) = (begin.clone(), tell.clone());
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK)
                .spawn(move || {
                    begin();
                    tell(vcpu.run(&buses, &its_gate));
                });
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    gate.stop();
                    return Err(error).or_host("starting a vCPU's thread");
                }
            }
        }
        Ok(VcpuControl {
            gate,
            threads: Mutex::new(threads),
            exits,
        })
    }

    /// What each vCPU left the guest for.
    pub fn exits(&self) -> &[Arc<ExitCounters>] {
        &self.exits
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Makes every vCPU leave the guest; false if one did not.
    pub fn pause(&self) -> bool {
        self.gate.close();
        self.kick();
        self.gate.closed(PAUSE_TIMEOUT)
    }

    /// Saves every vCPU, which wait: see [`VcpuControl::pause`].
    pub fn save(&self, scope: &Arc<StateScope>) -> Result<Vec<VcpuState>, Failure> {
        let saved = self.gate.save(scope.clone(), PAUSE_TIMEOUT);
        let saved = saved.ok_or_else(|| Failure::host("a vCPU is not saved"))?;
        saved
            .into_iter()
            .map(|state| state.or_host("a vCPU"))
            .collect()
    }

    /// Interrupts every vCPU, maskable or not.
    pub fn interrupt(&self) {
        self.gate.interrupt();
        self.kick();
    }

    /// Ends the vCPUs, and waits until they have.
    pub(super) fn stop(&self) {
        self.gate.stop();
        self.kick();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // A panic of the thread ends the process.
            let _ = thread.join();
        }
    }

    /// Makes the vCPUs leave the guest and look at their gate.
    fn kick(&self) {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.iter() {
            // One is enough: the handler makes KVM return even if the thread
            // is only about to enter the guest.
            let _ = thread.kill(vcpu::kick_signal());
        }
    }
}
