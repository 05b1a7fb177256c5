//! A virtual CPU: its first state, and running it.

#![allow(unsafe_code, reason = "KVM shares a structure")]

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    CpuId, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_regs,
    kvm_segment,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use mayfly_boot::EntryState;
use mayfly_boot::cpu::Segment;
use mayfly_devices::bus::Bus;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::cpuid::{self, Topology};
use super::error::{KvmError, doing};
use super::gate::{Gate, Next};
use super::msr;
use super::state::{self, StateError, StateScope, TscAnchor, VcpuState};
use super::vm::Vm;

/// How a vCPU came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEnd {
    /// It was told to.
    Stopped,
    /// The guest turned its machine off.
    PowerOff,
    /// The guest restarted its machine.
    Reset,
    /// The guest cannot go on.
    Crash(String),
}

/// The address spaces that a vCPU's accesses leave to.
#[derive(Default)]
pub struct Buses {
    /// Ports.
    pub io: Bus,
    /// Memory that is no RAM.
    pub mmio: Bus,
}

/// A vCPU that is not running yet.
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    index: u8,
    exits: Arc<ExitCounters>,
    /// How often in a row KVM did not enter the guest.
    refused: u32,
}

/// KVM does not enter a guest once or twice while another vCPU starts this one. It is another
/// matter if it can't: the first entry takes a thread of the kernel's, which counts as the
/// user's (`ulimit -u`).
const REFUSED_MAX: u32 = 1000;

/// What came of entering the guest.
enum Step {
    /// It left, and was served.
    Exit,
    /// It was told to look up.
    Kicked,
    /// It ended.
    End(VcpuEnd),
}

/// Why a vCPU left the guest for this process.
#[derive(Clone, Copy, Debug)]
enum Exit {
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Kick,
    Other,
}

/// How often a vCPU left the guest, by reason.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; 6]);

impl ExitCounters {
    fn count(&self, exit: Exit) {
        if let Some(counter) = self.0.get(exit as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Each reason's name and count.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let names = [
            "io_in",
            "io_out",
            "mmio_read",
            "mmio_write",
            "kick",
            "other",
        ];
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        names.into_iter().zip(counts)
    }
}

thread_local! {
    /// The flag of this thread's vCPU that makes KVM return at once.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that makes a vCPU's thread look up.
pub fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the handler of [`kick_signal`].
pub fn install_kick_handler() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        IMMEDIATE_EXIT.with(|cell| {
            let flag = cell.get();
            if !flag.is_null() {
                // SAFETY: `Running` set it to a field of this thread's
                // `kvm_run`, which is mapped until `Running` is dropped and
                // clears it. KVM and this thread alone write there.
                unsafe { ptr::write_volatile(flag, 1) };
            }
        });
    }
    register_signal_handler(kick_signal(), on_kick)
}

/// Keeps this thread's [`IMMEDIATE_EXIT`] valid.
struct Running;

impl Running {
    fn new(fd: &mut VcpuFd) -> Self {
        let flag: *mut u8 = &raw mut fd.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.with(|cell| cell.set(flag));
        Running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null_mut()));
    }
}

impl Vcpu {
    /// Creates the vCPU with the index, of `cpus`. It can run VMs itself if they are to be
    /// `nested`.
    pub fn new(vm: &Vm, index: u8, cpus: u8, nested: bool) -> Result<Self, KvmError> {
        let fd = vm.create_vcpu(index)?;
        let topology = Topology {
            apic_id: index,
            cpus,
            tsc_khz: fd.get_tsc_khz().ok(),
            tsc_deadline: vm.tsc_deadline,
            nested,
        };
        let leaves = cpuid::for_vcpu(vm.supported_cpuid.as_slice(), topology);
        let cpuid = CpuId::from_entries(&leaves).map_err(|_| KvmError {
            operation: "CPUID has too many leaves",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })?;
        fd.set_cpuid2(&cpuid).map_err(doing("setting CPUID"))?;
        msr::set_boot_msrs(&fd);
        Ok(Vcpu {
            fd,
            index,
            exits: Arc::default(),
            refused: 0,
        })
    }

    /// Sets the registers of the vCPU that boots; the others wait for it.
    pub fn set_entry(&self, entry: &EntryState) -> Result<(), KvmError> {
        let mut sregs = self.fd.get_sregs().map_err(doing("reading registers"))?;
        sregs.cs = segment(&entry.code);
        let data = segment(&entry.data);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = segment(&entry.tss);
        sregs.gdt.base = entry.gdt_base;
        sregs.gdt.limit = entry.gdt_limit;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = entry.cr0;
        sregs.cr3 = entry.cr3;
        sregs.cr4 = entry.cr4;
        sregs.efer = entry.efer;
        self.fd
            .set_sregs(&sregs)
            .map_err(doing("setting system registers"))?;
        let regs = kvm_regs {
            rip: entry.rip,
            rsp: entry.rsp,
            rsi: entry.rsi,
            rbx: entry.rbx,
            rflags: entry.rflags,
            ..Default::default()
        };
        self.fd.set_regs(&regs).map_err(doing("setting registers"))
    }

    /// What KVM holds of this vCPU, which is at rest: no access of it is unanswered.
    pub fn save(&self, scope: &StateScope) -> Result<VcpuState, StateError> {
        state::vcpu::save(&self.fd, scope)
    }

    /// Makes this vCPU, which never ran, go on as another was saved. The guest's memory is
    /// there already, and [`Vm::restore`] comes after the last vCPU. The guest's time goes on
    /// from here, so it runs as soon as all is done.
    pub fn restore(
        &self,
        state: &VcpuState,
        scope: &StateScope,
        anchor: TscAnchor,
    ) -> Result<(), StateError> {
        state::vcpu::restore(&self.fd, state, scope, anchor)
    }

    /// What this vCPU left the guest for.
    pub fn exits(&self) -> Arc<ExitCounters> {
        self.exits.clone()
    }

    /// Runs until the guest ends, or the gate says so.
    pub fn run(mut self, buses: &Buses, gate: &Gate) -> VcpuEnd {
        let end = self.run_to_end(buses, gate);
        gate.ended();
        end
    }

    fn run_to_end(&mut self, buses: &Buses, gate: &Gate) -> VcpuEnd {
        let _running = Running::new(&mut self.fd);
        loop {
            // A kick between this test and KVM_RUN makes KVM_RUN return.
            if gate.host_event() {
                let mut end = None;
                match gate.pass(self.index.into(), || end = self.settle(buses)) {
                    Next::Stop => return end.unwrap_or(VcpuEnd::Stopped),
                    Next::Run { nmi: true } => {
                        let _ = self.fd.nmi();
                    }
                    Next::Run { nmi: false } => {}
                    // One that ends has no state that it could go on with.
                    Next::Save(scope) if end.is_none() => {
                        gate.saved(self.index.into(), self.save(&scope));
                        continue;
                    }
                    Next::Save(_) => {}
                }
                if let Some(end) = end {
                    return end;
                }
            }
            if let Step::End(end) = self.step(buses) {
                return end;
            }
        }
    }

    /// Brings the vCPU to rest: KVM completes the access that it left the
    /// guest for, and tells the guest's watchdogs that it is away.
    fn settle(&mut self, buses: &Buses) -> Option<VcpuEnd> {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            match self.step(buses) {
                Step::Exit => {} // an access in several parts
                Step::Kicked => break,
                Step::End(end) => return Some(end),
            }
        }
        // Refused if the guest has no such clock.
        let _ = self.fd.kvmclock_ctrl();
        None
    }

    /// Enters the guest, and serves what it leaves for.
    fn step(&mut self, buses: &Buses) -> Step {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                let data = ptr::from_mut(data);
                self.exits.count(Exit::IoIn);
                let size = self.port_access_size();
                // SAFETY: KVM's memory behind `kvm_run`, which is mapped as long as `fd`;
                // it is this thread's until the vCPU runs again.
                for access in unsafe { &mut *data }.chunks_mut(size) {
                    buses.io.read(port.into(), access);
                }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data = ptr::from_ref(data);
                self.exits.count(Exit::IoOut);
                let size = self.port_access_size();
                // SAFETY: as above.
                for access in unsafe { &*data }.chunks(size) {
                    buses.io.write(port.into(), access);
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.exits.count(Exit::MmioRead);
                buses.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.exits.count(Exit::MmioWrite);
                buses.mmio.write(address, data);
            }
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {
                self.exits.count(Exit::Other);
            }
            Ok(VcpuExit::Shutdown) => {
                return Step::End(VcpuEnd::Crash(format!(
                    "triple fault on vCPU {}",
                    self.index
                )));
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN => return Step::End(VcpuEnd::PowerOff),
                KVM_SYSTEM_EVENT_RESET => return Step::End(VcpuEnd::Reset),
                KVM_SYSTEM_EVENT_CRASH => {
                    return Step::End(VcpuEnd::Crash("the guest said so".into()));
                }
                _ => {}
            },
            Ok(VcpuExit::InternalError) => {
                // SAFETY: the exit reason says that this is the member.
                let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
                return Step::End(VcpuEnd::Crash(format!(
                    "KVM internal error, suberror {}, on vCPU {}{}",
                    internal.suberror,
                    self.index,
                    self.location()
                )));
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Step::End(VcpuEnd::Crash(format!(
                    "the CPU refused to enter the guest (reason {reason:#x}) on vCPU {}{}",
                    self.index,
                    self.location()
                )));
            }
            Ok(exit) => {
                let exit = format!("{exit:?}");
                return Step::End(VcpuEnd::Crash(format!(
                    "unexpected exit {exit} on vCPU {}{}",
                    self.index,
                    self.location()
                )));
            }
            Err(error) => match error.errno() {
                libc::EINTR => {
                    self.exits.count(Exit::Kick);
                    self.fd.set_kvm_immediate_exit(0);
                    return Step::Kicked;
                }
                libc::EAGAIN if self.refused < REFUSED_MAX => {
                    self.refused += 1;
                    return Step::Exit;
                }
                _ => {
                    return Step::End(VcpuEnd::Crash(format!(
                        "KVM cannot run vCPU {}: {error}{}",
                        self.index,
                        self.location()
                    )));
                }
            },
        }
        self.refused = 0;
        Step::Exit
    }

    /// How wide each access is of those that the vCPU left the guest for: `rep ins` and
    /// `rep outs` make many, of which KVM hands over several at once.
    fn port_access_size(&mut self) -> usize {
        // SAFETY: a number, whichever member it is; after an exit for ports it is this one.
        let size = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        usize::from(size).max(1)
    }

    fn location(&self) -> String {
        self.fd
            .get_regs()
            .map_or_else(|_| String::new(), |regs| format!(", at {:#x}", regs.rip))
    }
}

fn segment(segment: &Segment) -> kvm_segment {
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.type_,
        present: segment.present.into(),
        dpl: segment.dpl,
        db: segment.db.into(),
        s: segment.s.into(),
        l: segment.l.into(),
        g: segment.g.into(),
        avl: segment.avl.into(),
        unusable: (!segment.present).into(),
        padding: 0,
    }
}
