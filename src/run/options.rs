//! What the user wants of `mayfly run`.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::builder::FalseyValueParser;
use mayfly_sandbox as sandbox;

use super::docker::DockerFlags;
use super::environment;
use crate::failure::Failure;
use crate::kvm::accept::AcceptKvm;

/// The flags, in the user's words.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Options {
    /// Leave nothing behind: no record, no log
    #[arg(long = "rm", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, value_name = "true|false",
          hide_possible_values = true, action = clap::ArgAction::Set)]
    pub remove: bool,
    /// Pass standard input on
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, value_name = "true|false",
          hide_possible_values = true, action = clap::ArgAction::Set)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short = 't', long = "tty", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, value_name = "true|false",
          hide_possible_values = true, action = clap::ArgAction::Set)]
    pub terminal: bool,
    /// Run in the background, and print the VM's name
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, value_name = "true|false",
          hide_possible_values = true, action = clap::ArgAction::Set)]
    pub(super) detach: bool,
    /// What the VM is called [default: the image's name and eight digits]
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<String>,
    /// An environment variable, the host's own if there is no value (repeatable)
    #[arg(short = 'e', long = "env", value_name = "NAME[=VALUE]")]
    pub environment: Vec<OsString>,
    /// A file with a variable in each line (repeatable)
    #[arg(long = "env-file", value_name = "FILE")]
    pub environment_files: Vec<PathBuf>,
    /// The folder to run in [default: the image's]
    #[arg(short = 'w', long = "workdir", value_name = "DIR")]
    pub folder: Option<OsString>,
    /// Who runs it [default: the image's]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// What runs, with COMMAND as its arguments [default: the image's]
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<OsString>,
    /// A folder of the host, an ext4 disk's image, or a named volume, which is made
    /// if it is missing, and filled with what the image has there; a DIR alone is one
    /// that ends with the VM (repeatable)
    #[arg(short = 'v', long = "volume", value_name = "[SRC:]DIR[:ro]")]
    pub volumes: Vec<OsString>,
    /// The same in other words; of type tmpfs, it is memory (repeatable)
    #[arg(
        long = "mount",
        value_name = "type=bind|volume|tmpfs[,src=SRC],dst=DIR[,ro]"
    )]
    pub mounts: Vec<OsString>,
    /// Memory as a folder (repeatable)
    #[arg(long, value_name = "DIR[:size=64M]")]
    pub tmpfs: Vec<OsString>,
    /// How much shared memory there may be in /dev/shm [default: half of the memory]
    #[arg(long, value_name = "SIZE")]
    pub shm_size: Option<String>,
    /// Nothing may be written but to volumes and memory
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, value_name = "true|false",
          hide_possible_values = true, action = clap::ArgAction::Set)]
    pub read_only: bool,
    /// The guest's name [default: the image's, else the VM's]
    #[arg(short = 'H', long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Another name in the guest's /etc/hosts (repeatable)
    #[arg(long, value_name = "NAME:IP")]
    pub add_host: Vec<String>,
    /// Let a port of the host be one of the guest's, a free one if none is given, or
    /// ports: 8000-8009:80-89 (repeatable)
    #[arg(short, long, value_name = "[[IP:]HOST:]GUEST[/udp]")]
    pub publish: Vec<String>,
    /// The network: sockets of the user's own (by passt), which reach the internet and,
    /// unless isolated, private networks; a TAP device; or none [default: user]
    #[arg(
        long,
        visible_alias = "network",
        value_name = "user[,isolated]|none|tap=NAME,ip=CIDR[,gateway=IP]"
    )]
    pub net: Option<String>,
    /// Let the guest reach nothing but this (repeatable)
    #[arg(long, value_name = "CIDR|DOMAIN[:PORT]")]
    pub allow: Vec<String>,
    /// The guest's resolver [default: the host's] (repeatable)
    #[arg(long, value_name = "IP")]
    pub dns: Vec<IpAddr>,
    /// A domain in which the guest looks names up [default: the host's; . for none]
    /// (repeatable)
    #[arg(long, value_name = "DOMAIN")]
    pub dns_search: Vec<String>,
    /// How the guest's resolver works: ndots:2 [default: the host's] (repeatable)
    #[arg(long = "dns-option", alias = "dns-opt", value_name = "OPTION")]
    pub dns_options: Vec<String>,
    /// A setting of the guest's kernel (repeatable)
    #[arg(long = "sysctl", value_name = "NAME=VALUE")]
    pub sysctls: Vec<String>,
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
    /// What asks the command to end, for mayfly stop [default: the image's, else TERM]
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<String>,
    /// How many seconds mayfly stop gives it [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub stop_timeout: Option<u64>,
    /// A limit of each process, as of setrlimit(2) (repeatable)
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub ulimit: Vec<String>,
    /// A group beside the user's own (repeatable)
    #[arg(long, value_name = "GROUP")]
    pub group_add: Vec<String>,
    /// When the registry is asked: if the image is missing, always, or never
    #[arg(
        long,
        value_name = "missing|always|never",
        default_value = "missing",
        hide_possible_values = true
    )]
    pub pull: Pull,
    /// Do not show how a pull goes on
    #[arg(short, long)]
    pub quiet: bool,
    /// What mayfly inspect tells of the VM (repeatable)
    #[arg(short, long = "label", value_name = "NAME[=VALUE]")]
    pub labels: Vec<OsString>,
    /// Write the VM's name to a file, which must not be there
    #[arg(long, value_name = "FILE")]
    pub cidfile: Option<PathBuf>,
    /// What surrounds the VMM process: all that the host has (on), all there is, or
    /// no VM (require), or nothing (off) [default: on]
    #[arg(long, value_name = "on|require|off")]
    pub sandbox: Option<sandbox::Mode>,
    /// Let the guest run VMs of its own, if this host's KVM can do that
    #[arg(long)]
    pub nested: bool,
    /// Use a KVM that seems to emulate.
    #[command(flatten)]
    pub accept_kvm: AcceptKvm,
    /// Another kernel
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Boot, also where a template would make the start faster, and make none
    #[arg(long, env = "MAYFLY_COLD", hide_env_values = true, value_parser = FalseyValueParser::new())]
    pub cold: bool,
    /// Why it boots, if that is not the user's wish
    #[arg(long, hide = true, value_name = "TEXT")]
    pub(super) cold_because: Option<String>,
    /// Say on standard error whether it started from a template, and if not, why
    #[arg(long)]
    pub verbose: bool,
    /// Print on standard error how long each phase took
    #[arg(long)]
    pub timing: bool,
    /// Print one JSON record at the end, as the last line of standard output
    #[arg(long)]
    pub json: bool,
    /// This is the process in the background, and this its VM's name
    #[arg(long, hide = true)]
    pub(super) detached: Option<String>,
    /// A variable that was in a file of --env-file: NAME=VALUE
    #[arg(long, hide = true)]
    pub(super) from_environment_files: Vec<OsString>,
    /// Only see to it that the image and volumes are there, and print folders to write to
    #[arg(long, hide = true)]
    pub(super) only_obtain: bool,
    /// A name in the store or of a registry, or the path of an archive, an OCI layout
    /// or a root folder, if it begins with / or .; then what to run, word by word, with
    /// whatever flags it has [default: what the image says]
    // One list: nothing behind its first word is a flag.
    #[arg(value_names = ["IMAGE", "COMMAND"], required = true, num_args = 1..,
          trailing_var_arg = true)]
    pub(super) words: Vec<OsString>,
    /// What is taken of Docker's words.
    #[command(flatten)]
    pub docker: DockerFlags,
    /// The first of the words.
    #[arg(skip)]
    pub image: String,
    /// The others.
    #[arg(skip)]
    pub command: Vec<OsString>,
}

/// When the registry is asked for an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Pull {
    /// If the store has none of that name.
    #[default]
    Missing,
    /// In any case: it may have a newer one.
    Always,
    /// Not at all.
    Never,
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
    /// Tells the image and the command apart.
    pub fn sort(mut self) -> Result<Self, Failure> {
        let mut words = std::mem::take(&mut self.words).into_iter();
        let image = words.next().unwrap_or_default();
        self.image = image.into_string().map_err(|image| {
            Failure::config(format!("{}: an image's name is UTF-8", image.display()))
        })?;
        self.command = words.collect();
        Ok(self)
    }

    /// Reads what may be there to be read but once. In the background all of it came with the
    /// words.
    pub(super) fn read_files(&mut self) -> Result<(), Failure> {
        if matches!(self.mode(), Mode::Foreground | Mode::Detach) {
            self.from_environment_files = environment::of_files(&self.environment_files)?;
        }
        Ok(())
    }

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
