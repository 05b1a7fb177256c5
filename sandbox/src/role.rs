//! Kinds of threads.

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
    /// All roles.
    pub const ALL: [Role; 3] = [Role::EventLoop, Role::Vcpu, Role::Io];

    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Role::EventLoop => "event-loop",
            Role::Vcpu => "vcpu",
            Role::Io => "io",
        }
    }
}
