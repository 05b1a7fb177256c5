//! Kinds of threads.

/// What a thread does, and so what it may ask of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The host's side of all devices. It starts no thread any more.
    EventLoop,
    /// Runs a vCPU, and serves its accesses to registers.
    Vcpu,
    /// The event loop of a VM that is saved.
    SavingEventLoop,
    /// A vCPU of a VM that is saved.
    SavingVcpu,
    /// Reads and writes a disk.
    Io,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 5] = [
        Role::EventLoop,
        Role::Vcpu,
        Role::SavingEventLoop,
        Role::SavingVcpu,
        Role::Io,
    ];

    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Role::EventLoop => "event-loop",
            Role::Vcpu => "vcpu",
            Role::SavingEventLoop => "saving-event-loop",
            Role::SavingVcpu => "saving-vcpu",
            Role::Io => "io",
        }
    }
}
