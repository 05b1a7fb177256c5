//! What the supervisor and the VMM process say to each other.

use std::time::Duration;

use mayfly_sandbox::{PreparedSandbox, Report};
use serde::{Deserialize, Serialize};

use crate::console::ConsoleFlags;
use crate::control::{Command, Event, Reply};
use crate::failure::{Class, Failure};
use crate::logging::LogStyle;
use crate::net::egress::EgressPolicy;
use crate::net::host::HostNetworks;
use crate::spec::MachineSpec;
use crate::timing::Timeline;

/// What the supervisor says.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToVmm {
    /// The host's backend of a device. Its descriptors come along.
    DeviceBackend {
        /// The device's name in the specification.
        device: String,
        /// What it is.
        backend: DeviceBackend,
    },
    /// Build the machine. All backends of its devices, and the host's networks, came before.
    Build(Box<BuildRequest>),
    /// Let the guest run. With it come a file for the log, if there is to be one,
    /// and those of the console and the channels.
    Start {
        /// There is a file for the log.
        log: bool,
        /// The console, then the channels.
        consoles: Vec<ConsoleFlags>,
    },
    /// The user asks for something.
    Ask {
        /// Marks the answer.
        id: u64,
        /// What is asked for.
        command: Command,
    },
    /// A signal is to end the machine.
    Signal(i32),
    /// The host's networks are these now.
    HostNetworks {
        /// A part of them.
        part: HostNetworks,
        /// Another part follows.
        more: bool,
    },
    /// The terminal has another size.
    Resized,
    /// End the machine, now.
    End,
}

impl ToVmm {
    /// The host's networks, in messages that are short enough.
    pub fn host_networks(now: &HostNetworks) -> Vec<Self> {
        let parts = now.parts();
        let last = parts.len().saturating_sub(1);
        let messages = parts.into_iter().enumerate().map(|(index, part)| {
            let more = index < last;
            ToVmm::HostNetworks { part, more }
        });
        messages.collect()
    }
}

/// All that a VMM process needs to build its machine. With it come descriptors: KVM, the
/// kernel, the initial RAM disk if there is one, the link for requests to the broker; then
/// those of [`SnapshotUse`].
#[derive(Debug, Serialize, Deserialize)]
pub struct BuildRequest {
    /// The machine.
    pub spec: MachineSpec,
    /// There is an initial RAM disk.
    pub initrd: bool,
    /// What is done with a snapshot.
    pub snapshot: SnapshotUse,
    /// The namespaces that the process is in, and how it is to lock itself in.
    pub sandbox: PreparedSandbox,
    /// How large in bytes a file that it writes to may become.
    pub file_size: u64,
    /// How messages are logged.
    pub log: LogStyle,
    /// When the start began, in microseconds of `CLOCK_MONOTONIC`.
    pub started_us: u64,
}

/// What a VMM process does with a snapshot. Its descriptors are the state file, the memory
/// file, and of a restore the message for the guest ([`mayfly_protocol::mailbox::Mail`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotUse {
    /// Nothing: the machine boots.
    #[default]
    None,
    /// The machine boots, is saved when its guest has come to the snapshot point, and ends.
    Save,
    /// The machine goes on as one that was saved; if that cannot be, it boots.
    Restore,
}

/// The host's backend of a device, without its descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceBackend {
    /// A disk's image, of one file or more.
    Disk(ImageLayout),
    /// A TAP device, attached once for each pair of queues.
    Tap,
    /// A socket that takes frames, and which of them may pass.
    Stream(EgressPolicy),
    /// A vhost-user backend of a shared directory, which was greeted: the features that it
    /// offers.
    Fs(u64),
    /// A socket where clients of the guest's sockets come.
    Vsock,
    /// Random bytes.
    Rng,
}

/// How the files of an image make a disk. They come in this order: the image's own, then its
/// backing file's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageLayout {
    /// One file, with the disk's bytes, of a length in bytes.
    Raw(u64),
    /// One file in QEMU's format, and perhaps the image that it is the difference to.
    Qcow2(Option<Box<ImageLayout>>),
    /// Files one after the other that are only read, with their lengths in bytes.
    Concat(Vec<u64>),
}

/// What the VMM process says.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromVmm {
    /// All is ready to start.
    Built(Origin),
    /// The sandbox is closed.
    Closed(Report),
    /// Nothing can fail any more, and the guest is about to run.
    Running,
    /// The machine cannot be built, or cannot start.
    Failed(VmmFailure),
    /// An answer.
    Reply {
        /// To that question.
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// Something happened.
    Event(Event),
    /// It is over.
    Ended(Ending),
}

/// Where a machine begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// It boots, as it was asked to.
    Boot,
    /// It goes on as one that was saved.
    Restored,
    /// It boots, as the one that was saved could not be restored.
    NotRestored {
        /// The reason.
        why: String,
        /// The saved one is of no use here, now and ever.
        unfit: bool,
    },
}

/// Why there is no machine. The VMM process knows no paths and flags: the supervisor adds
/// those of the part.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmmFailure {
    /// Whose fault it is.
    pub class: Class,
    /// Which part of the machine it is about.
    pub part: Option<Part>,
    /// The reason, for the user.
    pub message: String,
}

/// A part of a machine that the user knows by a flag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// The kernel's file.
    Kernel,
    /// The initial RAM disk's file.
    Initrd,
    /// The device of a name.
    Device(String),
    /// What the image of the disk of a name is the difference to.
    Backing(String),
}

impl From<Failure> for VmmFailure {
    fn from(failure: Failure) -> Self {
        VmmFailure {
            class: failure.class,
            part: None,
            message: failure.to_string(),
        }
    }
}

impl From<VmmFailure> for FromVmm {
    fn from(failure: VmmFailure) -> Self {
        FromVmm::Failed(failure)
    }
}

/// Names the part of the machine that an error is about.
pub trait BlamePart<T> {
    /// The user asked for what cannot be.
    fn or_config_of(self, part: Part) -> Result<T, VmmFailure>;
    /// The host refused.
    fn or_host_of(self, part: Part) -> Result<T, VmmFailure>;
}

impl<T, E: std::error::Error> BlamePart<T> for Result<T, E> {
    fn or_config_of(self, part: Part) -> Result<T, VmmFailure> {
        self.map_err(|error| VmmFailure::of(&error, Class::Config, part))
    }

    fn or_host_of(self, part: Part) -> Result<T, VmmFailure> {
        self.map_err(|error| VmmFailure::of(&error, Class::Host, part))
    }
}

impl VmmFailure {
    /// The failure of a part, with its causes.
    pub fn of(error: &dyn std::error::Error, class: Class, part: Part) -> Self {
        VmmFailure {
            class,
            part: Some(part),
            message: crate::failure::chain(error),
        }
    }
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The guest turned it off.
    PowerOff,
    /// The guest restarted it.
    Reset,
    /// The user ended it at the console.
    Quit,
    /// It did not turn off when the user asked.
    Forced,
    /// A signal ended it.
    Signal(i32),
    /// The guest's kernel panicked.
    Panic,
    /// The guest did not feed its watchdog for this time.
    Hung(Duration),
    /// The guest cannot go on.
    Crash(String),
    /// It was saved at its snapshot point, as it was asked to be.
    Saved,
    /// mayfly cannot go on.
    Internal(String),
}

impl Outcome {
    /// Its name in records and events.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::PowerOff => "power-off",
            Outcome::Reset => "reset",
            Outcome::Quit => "quit",
            Outcome::Forced => "forced-off",
            Outcome::Signal(_) => "signal",
            Outcome::Panic => "panic",
            Outcome::Hung(_) => "hung",
            Outcome::Crash(_) => "crash",
            Outcome::Saved => "saved",
            Outcome::Internal(_) => "internal",
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Crash(why) | Outcome::Internal(why) => write!(f, "{}: {why}", self.name()),
            _ => f.write_str(self.name()),
        }
    }
}

/// All there is to say about a machine that ended.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ending {
    /// How it ended.
    pub outcome: Outcome,
    /// What the guest's init said of its work.
    pub guest_status: Option<u8>,
    /// The console's last lines, if it is not standard output.
    pub last_lines: Vec<String>,
    /// When each phase of the start ended.
    pub timeline: Timeline,
}
