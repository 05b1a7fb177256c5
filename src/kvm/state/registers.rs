//! Registers as plain structs, and from and to KVM's.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_msr_entry, kvm_pic_state,
    kvm_pit_channel_state, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
    kvm_vcpu_events__bindgen_ty_1, kvm_vcpu_events__bindgen_ty_2, kvm_vcpu_events__bindgen_ty_3,
    kvm_vcpu_events__bindgen_ty_4, kvm_xcr,
};
use serde::{Deserialize, Serialize};

/// A struct with fields of one of KVM's, without its padding.
macro_rules! mirror {
    ($(#[$doc:meta])* $name:ident of $kvm:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        ///
        /// Its fields are called as in KVM's interface.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[expect(missing_docs, reason = "they have their names from KVM's documentation")]
        pub struct $name {
            $(pub $field: $type,)*
        }

        impl From<$kvm> for $name {
            fn from(kvm: $kvm) -> Self {
                $name { $($field: kvm.$field.into(),)* }
            }
        }

        impl From<$name> for $kvm {
            #[allow(clippy::needless_update, reason = "some have no padding")]
            fn from(state: $name) -> Self {
                $kvm { $($field: state.$field.into(),)* ..Default::default() }
            }
        }
    };
}

mirror! {
    /// The general-purpose registers (`kvm_regs`).
    GeneralRegisters of kvm_regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64,
        rsi: u64, rdi: u64, rsp: u64, rbp: u64,
        r8: u64, r9: u64, r10: u64, r11: u64,
        r12: u64, r13: u64, r14: u64, r15: u64,
        rip: u64, rflags: u64,
    }
}

mirror! {
    /// A segment register (`kvm_segment`).
    SegmentState of kvm_segment {
        base: u64, limit: u32, selector: u16, type_: u8,
        present: u8, dpl: u8, db: u8, s: u8, l: u8, g: u8, avl: u8, unusable: u8,
    }
}

mirror! {
    /// Where a descriptor table lies (`kvm_dtable`).
    DescriptorTable of kvm_dtable { base: u64, limit: u16, }
}

mirror! {
    /// Segments and control registers (`kvm_sregs`).
    SystemRegisters of kvm_sregs {
        cs: SegmentState, ds: SegmentState, es: SegmentState,
        fs: SegmentState, gs: SegmentState, ss: SegmentState,
        tr: SegmentState, ldt: SegmentState,
        gdt: DescriptorTable, idt: DescriptorTable,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64,
        efer: u64, apic_base: u64, interrupt_bitmap: [u64; 4],
    }
}

mirror! {
    /// Debug registers (`kvm_debugregs`).
    DebugRegisters of kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, }
}

mirror! {
    /// An extended control register (`kvm_xcr`).
    Xcr of kvm_xcr { xcr: u32, value: u64, }
}

mirror! {
    /// A model-specific register (`kvm_msr_entry`).
    Msr of kvm_msr_entry { index: u32, data: u64, }
}

mirror! {
    /// A leaf of CPUID (`kvm_cpuid_entry2`).
    CpuidLeaf of kvm_cpuid_entry2 {
        function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32,
    }
}

mirror! {
    /// An exception on its way (`kvm_vcpu_events.exception`).
    Exception of kvm_vcpu_events__bindgen_ty_1 {
        injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: u32,
    }
}

mirror! {
    /// An interrupt on its way (`kvm_vcpu_events.interrupt`).
    Interrupt of kvm_vcpu_events__bindgen_ty_2 { injected: u8, nr: u8, soft: u8, shadow: u8, }
}

mirror! {
    /// Non-maskable interrupts (`kvm_vcpu_events.nmi`).
    Nmi of kvm_vcpu_events__bindgen_ty_3 { injected: u8, pending: u8, masked: u8, }
}

mirror! {
    /// System management mode (`kvm_vcpu_events.smi`).
    Smi of kvm_vcpu_events__bindgen_ty_4 {
        smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8,
    }
}

mirror! {
    /// One of the two interrupt controllers (`kvm_pic_state`).
    PicState of kvm_pic_state {
        last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8,
        read_reg_select: u8, poll: u8, special_mask: u8, init_state: u8, auto_eoi: u8,
        rotate_on_auto_eoi: u8, special_fully_nested_mode: u8, init4: u8, elcr: u8,
        elcr_mask: u8,
    }
}

mirror! {
    /// A channel of the timer (`kvm_pit_channel_state`). The moment when it was loaded is not
    /// in it: it is the host's, and KVM takes the moment of the restore.
    PitChannel of kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8,
        read_state: u8, write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8,
        gate: u8,
    }
}

/// The timer (`kvm_pit_state2`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// Its three channels.
    pub channels: [PitChannel; 3],
    /// `KVM_PIT_FLAGS_*`: what the guest chose.
    pub flags: u32,
}

/// The I/O APIC (`kvm_ioapic_state`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// Its address in guest memory.
    pub base_address: u64,
    /// Which of its registers is next.
    pub ioregsel: u32,
    /// Its identifier.
    pub id: u32,
    /// The interrupts that are asserted, as bits.
    pub irr: u32,
    /// What becomes of each interrupt.
    pub redirection: [u64; 24],
}

/// What is on its way to a vCPU (`kvm_vcpu_events`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// An exception.
    pub exception: Exception,
    /// Its payload (`DR6` or `CR2`), where KVM tells it apart.
    pub exception_payload: Option<u64>,
    /// An interrupt.
    pub interrupt: Interrupt,
    /// Non-maskable interrupts.
    pub nmi: Nmi,
    /// The vector that the vCPU starts at.
    pub sipi_vector: u32,
    /// System management mode.
    pub smi: Smi,
    /// A triple fault.
    pub triple_fault: u8,
    /// Which of them KVM is to take (`KVM_VCPUEVENT_VALID_*`).
    pub flags: u32,
}

impl From<kvm_vcpu_events> for Events {
    fn from(events: kvm_vcpu_events) -> Self {
        let payload = events.exception_has_payload != 0;
        Events {
            exception: events.exception.into(),
            exception_payload: payload.then_some(events.exception_payload),
            interrupt: events.interrupt.into(),
            nmi: events.nmi.into(),
            sipi_vector: events.sipi_vector,
            smi: events.smi.into(),
            triple_fault: events.triple_fault.pending,
            flags: events.flags,
        }
    }
}

impl From<Events> for kvm_vcpu_events {
    fn from(events: Events) -> Self {
        let mut kvm = kvm_vcpu_events {
            exception: events.exception.into(),
            interrupt: events.interrupt.into(),
            nmi: events.nmi.into(),
            sipi_vector: events.sipi_vector,
            smi: events.smi.into(),
            flags: events.flags,
            exception_has_payload: events.exception_payload.is_some().into(),
            exception_payload: events.exception_payload.unwrap_or(0),
            ..Default::default()
        };
        kvm.triple_fault.pending = events.triple_fault;
        kvm
    }
}
