//! On real KVM, where there is one: an emulator of guest code will do.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VcpuExit};
use mayfly_devices::bus::{BusDevice, lock};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::Killable;

use super::*;
use crate::kvm::gate::Gate;
use crate::kvm::memory::{GuestMemory, guest_memory};
use crate::kvm::vcpu::{Buses, Vcpu, install_kick_handler, kick_signal};
use crate::kvm::vm::{self, Vm};
use crate::spec::MemorySpec;

const SIZE: u64 = 1 << 20;
const CODE: u64 = 0x1000;
const COUNT: u64 = 0x2000;
const PORT: u16 = 0x10;
/// Real mode: inc ax; mov [0x2000], ax; out 0x10, al; jmp to the first.
const PROGRAM: [u8; 8] = [0x40, 0xa3, 0x00, 0x20, 0xe6, 0x10, 0xeb, 0xf6];

// Registers of the local APIC, by their offsets.
const SPURIOUS: usize = 0xf0;
const LVT_TIMER: usize = 0x320;
const CURRENT_COUNT: usize = 0x390;

/// A machine that was not started.
struct Machine {
    memory: GuestMemory,
    vm: Vm,
    vcpus: Vec<Vcpu>,
}

/// All of a machine but its memory.
#[derive(Clone, Debug, PartialEq)]
struct Saved {
    vcpus: Vec<VcpuState>,
    vm: VmState,
}

/// KVM, if this user has it.
fn kvm() -> Option<(Kvm, StateScope)> {
    let kvm = vm::open().ok();
    if kvm.is_none() {
        eprintln!("not tested: there is no KVM");
    }
    kvm.map(|kvm| {
        let scope = StateScope::of(&kvm).unwrap();
        (kvm, scope)
    })
}

impl Machine {
    fn new(kvm: &Kvm, cpus: u8) -> Self {
        let memory = guest_memory(&MemorySpec {
            size: SIZE,
            ..Default::default()
        })
        .unwrap();
        memory.write_slice(&PROGRAM, GuestAddress(CODE)).unwrap();
        let mut vm = Vm::new(kvm).unwrap();
        vm.add_memory(&memory);
        vm.set_memory().unwrap();
        let vcpus = (0..cpus)
            .map(|index| Vcpu::new(&vm, index, cpus, false).unwrap())
            .collect();
        Machine { memory, vm, vcpus }
    }

    fn save(&self, scope: &StateScope) -> Saved {
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.save(scope).unwrap());
        Saved {
            vcpus: vcpus.collect(),
            vm: self.vm.save().unwrap(),
        }
    }

    fn restored(kvm: &Kvm, scope: &StateScope, saved: &Saved) -> Result<Self, StateError> {
        let machine = Machine::new(kvm, saved.vcpus.len().try_into().unwrap());
        let anchor = TscAnchor::new(saved.vm.clock.host_tsc);
        for (vcpu, state) in machine.vcpus.iter().zip(&saved.vcpus) {
            vcpu.restore(state, scope, anchor)?;
        }
        machine.vm.restore(&saved.vm)?;
        Ok(machine)
    }

    /// Makes the program the first vCPU's next.
    fn start(&self) {
        let fd = &self.vcpus[0].fd;
        let mut sregs = fd.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        fd.set_sregs(&sregs).unwrap();
        fd.set_regs(&kvm_regs {
            rip: CODE,
            rflags: 2,
            ..Default::default()
        })
        .unwrap();
    }

    /// What the program says next, and nothing of it is unanswered.
    fn step(&mut self) -> u8 {
        let fd = &mut self.vcpus[0].fd;
        let said = match fd.run().unwrap() {
            VcpuExit::IoOut(PORT, &[byte]) => byte,
            exit => panic!("{exit:?}"),
        };
        fd.set_kvm_immediate_exit(1);
        assert_eq!(fd.run().unwrap_err().errno(), libc::EINTR);
        fd.set_kvm_immediate_exit(0);
        said
    }
}

impl Saved {
    fn msr(&mut self, vcpu: usize, index: u32) -> &mut u64 {
        let msrs = &mut self.vcpus[vcpu].msrs;
        let at = match msrs.binary_search_by_key(&index, |msr| msr.index) {
            Ok(at) => at,
            Err(at) => {
                msrs.insert(at, Msr { index, data: 0 });
                at
            }
        };
        &mut msrs[at].data
    }

    fn lapic(&mut self, vcpu: usize, register: usize, value: u32) {
        self.vcpus[vcpu].lapic[register..register + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// How long the timer of a vCPU's local APIC has left, on the time stamp counter.
    fn left(&mut self, vcpu: usize) -> i64 {
        let deadline = *self.msr(vcpu, 0x6e0);
        deadline
            .wrapping_sub(self.vcpus[vcpu].tsc.value)
            .cast_signed()
    }

    /// Without what goes on by itself.
    fn settled(&self) -> Self {
        let mut saved = self.clone();
        for index in 0..saved.vcpus.len() {
            saved.vcpus[index].tsc.value = 0;
            saved.vcpus[index].tsc.offset = None;
            saved.lapic(index, CURRENT_COUNT, 0);
        }
        saved.vm.clock = ClockState::default();
        saved
    }
}

/// Tells states' differences by the lines that they print, which are many.
#[track_caller]
fn assert_same(one: &Saved, other: &Saved) {
    let [one, other] = [one, other].map(|saved| format!("{:#x?}", saved.settled()));
    let mut lines = one.lines().zip(other.lines());
    let difference = lines.position(|(one, other)| one != other);
    if one != other {
        let around = |text: &str| {
            let from = difference.unwrap_or(0).saturating_sub(8);
            let lines: Vec<_> = text.lines().skip(from).take(12).collect();
            lines.join("\n")
        };
        panic!("{}\n\ninstead of\n\n{}", around(&one), around(&other));
    }
}

/// A machine's state with something in each of its parts.
fn eventful(kvm: &Kvm, scope: &StateScope) -> Saved {
    let machine = Machine::new(kvm, 2);
    machine.vcpus[0].fd.nmi().unwrap();
    let mut saved = machine.save(scope);
    let deadline = saved.vcpus[0].tsc.value + (1 << 50);
    // The APIC's timer, with an interrupt at a moment far away.
    saved.lapic(0, SPURIOUS, 0x1ff);
    saved.lapic(0, LVT_TIMER, 0x40020);
    *saved.msr(0, 0x6e0) = deadline;
    *saved.msr(0, 0x174) = 0x33; // IA32_SYSENTER_CS
    *saved.msr(1, 0x277) = 0x0007_0406_0007_0406; // IA32_PAT
    *saved.msr(1, 0xc000_0081) = 0x23_0010 << 32; // STAR
    *saved.msr(1, 0x4b56_4d01) = 0x3001; // kvmclock
    *saved.msr(1, 0x12) = 0x3001; // the same, by its old name
    let vcpu = &mut saved.vcpus[1];
    vcpu.registers.rax = u64::MAX;
    vcpu.registers.r15 = 15;
    vcpu.system.cr2 = 0x1234_5000;
    vcpu.system.ds.selector = 0x123;
    vcpu.system.ds.base = 0x1230;
    vcpu.debug.db[3] = 0x4567;
    vcpu.xsave.resize(520, 0);
    vcpu.xsave[160] = 77; // XMM0
    vcpu.xsave[512] |= 0b11; // in use: FPU, SSE
    vcpu.xsave.truncate(513);
    let vm = &mut saved.vm;
    vm.pics[0].imr = 0xfb;
    vm.pics[1].irq_base = 0x28;
    vm.ioapic.redirection[5] = 0x0100_0000_0001_0031;
    vm.ioapic.id = 1;
    vm.pit.channels[2].mode = 3;
    vm.pit.channels[2].count = 0x4321;
    saved
}

#[test]
fn what_was_restored_is_saved_as_it_was() {
    let Some((kvm, scope)) = kvm() else { return };
    let saved = eventful(&kvm, &scope);
    assert_eq!(saved.vcpus[0].events.nmi.pending, 1);
    // Five deep.
    let mut last = saved.clone();
    for _ in 0..5 {
        last = Machine::restored(&kvm, &scope, &last).unwrap().save(&scope);
        assert_same(&last, &saved);
    }
}

#[test]
fn a_guest_goes_on_counting_where_it_was() {
    let Some((kvm, scope)) = kvm() else { return };
    let mut source = Machine::new(&kvm, 1);
    source.start();
    for count in 1..=20 {
        assert_eq!(source.step(), count);
    }
    let saved = source.save(&scope);
    let mut pages = vec![0; SIZE as usize];
    source
        .memory
        .read_slice(&mut pages, GuestAddress(0))
        .unwrap();

    let mut clone = Machine::restored(&kvm, &scope, &saved).unwrap();
    clone.memory.write_slice(&pages, GuestAddress(0)).unwrap();
    assert_eq!(clone.step(), 21);
    assert_eq!(source.step(), 21);
    assert_eq!(clone.step(), 22);
    let count: u16 = clone.memory.read_obj(GuestAddress(COUNT)).unwrap();
    assert_eq!(count, 22);
}

/// Some backends of KVM leave the counter of the host to the guest.
fn has_own_counter(kvm: &Kvm) -> bool {
    let machine = Machine::new(kvm, 1);
    let fd = &machine.vcpus[0].fd;
    msrs::write_one(fd, msrs::IA32_TSC, 1 << 60).unwrap();
    let own = msrs::read_one(fd, msrs::IA32_TSC).unwrap() >> 59 != 0;
    if !own {
        eprintln!("not tested: KVM does not set the time stamp counter here");
    }
    own
}

/// As a machine runs: its vCPUs are saved by their threads, and go on.
#[test]
fn vcpus_are_saved_at_the_gate_and_go_on() {
    const TIMEOUT: Duration = Duration::from_secs(20);
    /// Counts what the program says.
    #[derive(Default)]
    struct Listener(Vec<u8>);
    impl BusDevice for Listener {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0.extend_from_slice(data);
        }
    }

    let Some((kvm, scope)) = kvm() else { return };
    install_kick_handler().unwrap();
    let scope = Arc::new(scope);
    let mut source = Machine::new(&kvm, 2);
    source.start();
    let listener = Arc::new(Mutex::new(Listener::default()));
    let mut buses = Buses::default();
    buses.io.insert(PORT.into(), 1, listener.clone()).unwrap();
    let (buses, gate) = (Arc::new(buses), Arc::new(Gate::new(2)));
    let threads: Vec<_> = source
        .vcpus
        .drain(..)
        .map(|vcpu| {
            let (buses, gate) = (buses.clone(), gate.clone());
            thread::spawn(move || vcpu.run(&buses, &gate))
        })
        .collect();
    let heard = || lock(&listener).0.len();
    let close = || {
        gate.close();
        threads.iter().for_each(|thread| {
            thread.kill(kick_signal()).unwrap();
        });
        assert!(gate.closed(TIMEOUT));
    };
    for round in 0..5 {
        gate.open();
        let before = heard();
        while heard() < before + 10 {
            thread::yield_now();
        }
        close();
        let states = gate.save(scope.clone(), TIMEOUT).unwrap();
        let vcpus = states.into_iter().map(Result::unwrap).collect();
        let saved = Saved {
            vcpus,
            vm: source.vm.save().unwrap(),
        };
        assert_eq!(saved.vcpus[1].mp_state, 1, "it waits to be started");
        let mut clone = Machine::restored(&kvm, &scope, &saved).unwrap();
        // What was said last is not said again.
        let last = *lock(&listener).0.last().unwrap();
        assert_eq!(clone.step(), last.wrapping_add(1), "round {round}");
    }
    let said = lock(&listener).0.clone();
    let in_order = |(index, byte): (usize, &u8)| *byte == (index + 1) as u8;
    assert!(said.iter().enumerate().all(in_order), "{said:?}");
    gate.stop();
    threads.into_iter().for_each(|thread| {
        thread.join().unwrap();
    });
    assert!(gate.save(scope, TIMEOUT).is_none());
}

#[test]
fn the_clock_stands_still_meanwhile() {
    const AWAY: Duration = Duration::from_millis(300);
    let Some((kvm, scope)) = kvm() else { return };
    let saved = Machine::new(&kvm, 1).save(&scope);
    thread::sleep(AWAY);
    let clone = Machine::restored(&kvm, &scope, &saved).unwrap();
    let then = clone.save(&scope).vm.clock.guest;
    let passed = then.checked_sub(saved.vm.clock.guest).unwrap();
    assert!(passed < AWAY.as_nanos() as u64, "{passed} ns");
}

#[test]
fn counters_stand_still_meanwhile_and_keep_their_distance() {
    const AWAY: Duration = Duration::from_millis(300);
    let Some((kvm, scope)) = kvm() else { return };
    if !has_own_counter(&kvm) {
        return;
    }
    let mut saved = Machine::new(&kvm, 2).save(&scope);
    let khz = u64::from(saved.vcpus[0].tsc.khz.unwrap());
    let ahead = khz * 1000 * 7200;
    let tsc = &mut saved.vcpus[1].tsc;
    tsc.value += ahead;
    tsc.offset = tsc.offset.map(|offset| offset.wrapping_add(ahead));
    thread::sleep(AWAY);

    let clone = Machine::restored(&kvm, &scope, &saved).unwrap();
    let then = clone.save(&scope);
    let passed = then.vcpus[0]
        .tsc
        .value
        .wrapping_sub(saved.vcpus[0].tsc.value);
    let limit = khz * AWAY.as_millis() as u64;
    assert!(passed < limit, "{passed} of {limit}");
    let offsets = |saved: &Saved| Some([saved.vcpus[0].tsc.offset?, saved.vcpus[1].tsc.offset?]);
    if let Some([one, other]) = offsets(&then) {
        let [first, second] = offsets(&saved).unwrap();
        assert_eq!(other.wrapping_sub(one), second.wrapping_sub(first));
    }
}

/// As before Linux 5.16.
#[test]
fn a_counter_without_an_offset_goes_on_by_its_value() {
    let Some((kvm, scope)) = kvm() else { return };
    if !has_own_counter(&kvm) {
        return;
    }
    let mut saved = Machine::new(&kvm, 1).save(&scope);
    saved.vcpus[0].tsc.offset = None;
    saved.vcpus[0].tsc.value = 1 << 60;
    let then = Machine::restored(&kvm, &scope, &saved)
        .unwrap()
        .save(&scope);
    let passed = then.vcpus[0].tsc.value.checked_sub(1 << 60).unwrap();
    assert!(passed < 1 << 40, "{passed}");
}

/// Also where the host started again meanwhile, and KVM does not set the counter.
#[test]
fn a_timer_has_as_long_left_as_when_it_was_saved() {
    let Some((kvm, scope)) = kvm() else { return };
    for behind in [0, 1 << 45, (1_u64 << 45).wrapping_neg()] {
        let mut saved = eventful(&kvm, &scope);
        saved.vcpus[0].tsc.value = saved.vcpus[0].tsc.value.wrapping_add(behind);
        saved.vm.clock.host_tsc = saved.vm.clock.host_tsc.wrapping_add(behind);
        let deadline = saved.vcpus[0].tsc.value + (1 << 40);
        *saved.msr(0, 0x6e0) = deadline;
        let mut then = Machine::restored(&kvm, &scope, &saved)
            .unwrap()
            .save(&scope);
        let passed = saved.left(0) - then.left(0);
        assert!((0..1 << 35).contains(&passed), "{behind:#x}: {passed}");
    }
}

#[test]
fn hostile_states_are_refused() {
    type Change = fn(&mut Saved);
    let Some((kvm, scope)) = kvm() else { return };
    let good = eventful(&kvm, &scope);
    let changes: &[(Change, &str)] = &[
        (|saved| saved.vcpus[0].version = 2, "its version is 2"),
        (|saved| saved.vm.version = 0, "its version is 0"),
        (|saved| saved.vcpus[0].mp_state = 5, "no vCPU of this kind"),
        (|saved| saved.vcpus[0].lapic.truncate(1023), "local APIC"),
        (
            |saved| saved.vcpus[0].lapic.resize(1 << 20, 1),
            "local APIC",
        ),
        (|saved| saved.vcpus[0].xsave.resize(1 << 20, 1), "vectors"),
        (|saved| saved.vcpus[1].xsave[512..].fill(0xff), "vectors"),
        (
            |saved| saved.vcpus[0].xcrs.resize(17, Xcr::default()),
            "extended control registers",
        ),
        (|saved| saved.vcpus[0].events.flags = 1 << 31, "events"),
        (|saved| *saved.msr(0, 0xc000_1234) = 1, "MSR 0xc0001234"),
        (|saved| *saved.msr(0, 0x10) = 1, "MSR 0x10 "),
        (
            |saved| saved.vcpus[0].msrs.resize(1 << 16, Msr::default()),
            "not in order",
        ),
        (|saved| saved.vcpus[0].msrs.reverse(), "not in order"),
        // An address that no CPU has: LSTAR.
        (
            |saved| *saved.msr(0, 0xc000_0082) = 1 << 62,
            "MSR 0xc0000082",
        ),
        (|saved| saved.vcpus[0].system.cr0 = 1 << 31, "registers"),
        (|saved| saved.vcpus[0].system.cr4 = u64::MAX, "registers"),
        (|saved| saved.vcpus[0].xcrs[0].value = u64::MAX, "registers"),
        (|saved| saved.vcpus[0].debug.dr7 = u64::MAX, "debug"),
        (
            |saved| {
                saved.vcpus[0].events.exception.injected = 1;
                saved.vcpus[0].events.exception.nr = 200;
            },
            "events",
        ),
        // What would offer VMs of its own to a guest that is not to have them.
        (|saved| saved.vcpus[0].cpuid[1].ecx |= 1 << 5, "leaf 0x1,"),
        (|saved| saved.vcpus[0].cpuid.truncate(3), "leaf 0x"),
        (|saved| saved.vcpus[0].cpuid.clear(), "leaf 0x0,"),
        (
            |saved| saved.vcpus[0].cpuid.resize(1 << 16, CpuidLeaf::default()),
            "leaf 0x0,",
        ),
        (|saved| saved.vcpus[0].tsc.khz = Some(1), "runs at"),
        (|saved| saved.vm.pit.channels[1].count = u32::MAX, "timer"),
        (|saved| saved.vm.pit.channels[2].mode = 8, "timer"),
    ];
    for (number, (change, message)) in changes.iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad);
        let Err(error) = Machine::restored(&kvm, &scope, &bad) else {
            panic!("change {number} is accepted instead of \"{message}\"");
        };
        let error = format!("{error}");
        assert!(error.contains(message), "{error} for {message}");
    }
}

/// Linux forgives more or less; none of it must harm this process.
#[test]
fn nonsense_that_the_kernel_may_take_harms_nobody() {
    let Some((kvm, scope)) = kvm() else { return };
    let mut saved = eventful(&kvm, &scope);
    saved.vcpus[0].lapic.fill(0xff);
    saved.vm.ioapic.redirection = [u64::MAX; 24];
    saved.vm.ioapic.irr = u32::MAX;
    saved.vm.pit.flags = u32::MAX;
    saved.vm.clock.guest = u64::MAX;
    saved.vm.clock.host_tsc = u64::MAX;
    let _ = Machine::restored(&kvm, &scope, &saved);
}
