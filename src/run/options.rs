//! What the user wants of `mayfly run`.

use std::net::IpAddr;
use std::path::PathBuf;

use crate::kvm::accept::AcceptKvm;
use crate::sandbox;

/// The flags, in the user's words.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Options {
    /// Leave nothing behind: no record, no log
    #[arg(long = "rm")]
    pub remove: bool,
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short = 't', long = "tty")]
    pub terminal: bool,
    /// Run in the background, and print the VM's name
    #[arg(short, long)]
    pub(super) detach: bool,
    /// What the VM is called [default: the image's name and eight digits]
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<String>,
    /// An environment variable, the host's own if there is no value (repeatable)
    #[arg(short = 'e', long = "env", value_name = "NAME[=VALUE]")]
    pub environment: Vec<String>,
    /// A file with a variable in each line (repeatable)
    #[arg(long = "env-file", value_name = "FILE")]
    pub environment_files: Vec<PathBuf>,
    /// The folder to run in [default: the image's]
    #[arg(short = 'w', long = "workdir", value_name = "DIR")]
    pub folder: Option<String>,
    /// Who runs it [default: the image's]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// What runs, with COMMAND as its arguments [default: the image's]
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// A folder of the host, an ext4 disk's image, or a named volume, which is made
    /// if it is missing, and filled with what the image has there; a DIR alone is one
    /// that ends with the VM (repeatable)
    #[arg(short = 'v', long = "volume", value_name = "[SRC:]DIR[:ro]")]
    pub volumes: Vec<String>,
    /// Memory as a folder (repeatable)
    #[arg(long, value_name = "DIR[:size=64M]")]
    pub tmpfs: Vec<String>,
    /// Nothing may be written but to volumes and memory
    #[arg(long)]
    pub read_only: bool,
    /// The guest's name [default: the image's, else the VM's]
    #[arg(short = 'H', long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Let a port of the host be one of the guest's (repeatable)
    #[arg(short, long, value_name = "[IP:]HOST:GUEST[/udp]")]
    pub publish: Vec<String>,
    /// The network: sockets of the user's own (by passt), a TAP device, or none
    /// [default: user]
    #[arg(long, value_name = "user|none|tap=NAME,ip=CIDR[,gateway=IP]")]
    pub net: Option<String>,
    /// Let the guest reach nothing but this (repeatable)
    #[arg(long, value_name = "CIDR|DOMAIN[:PORT]")]
    pub allow: Vec<String>,
    /// The guest's resolver [default: the host's] (repeatable)
    #[arg(long, value_name = "IP")]
    pub dns: Vec<IpAddr>,
    /// vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<String>,
    /// Memory: 512M, 2G; a plain number is MiB [default: 512M]
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Keep what is written on a disk of that size, not in memory
    #[arg(long, value_name = "SIZE")]
    pub disk_size: Option<String>,
    /// Keep at most that much of the command's output for `mayfly logs`, and at least half
    /// of it [default: 64M]
    #[arg(long, value_name = "SIZE")]
    pub log_size: Option<String>,
    /// End the VM after that long: 10s, 5m, 1h; a plain number is seconds
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<String>,
    /// What surrounds the machine's process: all that the host has (on), all there is, or
    /// no VM (require), or nothing (off) [default: on]
    #[arg(long, value_name = "on|require|off")]
    pub sandbox: Option<sandbox::Mode>,
    /// Use a KVM that seems to emulate.
    #[command(flatten)]
    pub accept_kvm: AcceptKvm,
    /// Another kernel
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Print on standard error how long each phase took
    #[arg(long)]
    pub timing: bool,
    /// Print one JSON record at the end, as the last line of standard output
    #[arg(long)]
    pub json: bool,
    /// This is the process in the background, and this its VM's name
    #[arg(long, hide = true)]
    pub(super) detached: Option<String>,
    /// Only see to it that the image and volumes are there, and print folders to write to
    #[arg(long, hide = true)]
    pub(super) only_obtain: bool,
    /// A name in the store or of a registry; the path of an archive, an OCI layout
    /// or a root folder, if it begins with / or .
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// What to run [default: the image's]
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<String>,
}

/// What a call of `mayfly run` is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Run the VM, with the caller's streams.
    Foreground,
    /// Start another process that does, in the background.
    Detach,
    /// Be that process.
    Background,
    /// Only see to it that the image and volumes are there, and print the folders
    /// that the VM would write to, each with a NUL behind it.
    Obtain,
}

impl Options {
    /// What is to be done.
    pub fn mode(&self) -> Mode {
        match self {
            Options {
                only_obtain: true, ..
            } => Mode::Obtain,
            Options {
                detached: Some(_), ..
            } => Mode::Background,
            Options { detach: true, .. } => Mode::Detach,
            _ => Mode::Foreground,
        }
    }

    /// The VM's name, if it is given.
    pub fn name(&self) -> Option<&String> {
        self.detached.as_ref().or(self.name.as_ref())
    }
}
