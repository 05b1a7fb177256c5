//! `mayfly run`

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::run::{self, Options};
use crate::timing::Timeline;

const EXAMPLES: &str = "\
Examples:
  mayfly run demo echo hello
  mayfly run --rm -it debian bash
  mayfly run --rm -v ./src:/src:ro -v data:/data -w /src debian make
  mayfly run -d --name web -p 8080:80 nginx
  mayfly run --net none --memory 256M --timeout 10s demo sh -c 'wc -c < /dev/zero'

Exit status: the command's own; 128+N if a signal ended it; 124 after --timeout;
125 if mayfly failed; 126 if the command can't be executed; 127 if there is none.";

/// Flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Leave nothing behind: no record, no log
    #[arg(long)]
    rm: bool,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Run in the background, and print the VM's name
    #[arg(short, long)]
    detach: bool,
    /// What the VM is called [default: the image's name and four digits]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// An environment variable, the host's own if there is no value (repeatable)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// A file with a variable in each line (repeatable)
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// The folder to run in [default: the image's]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Who runs it [default: the image's]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// What runs, with COMMAND as its arguments [default: the image's]
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// A folder of the host, an ext4 disk's image, or a named volume, which is made
    /// if it is missing (repeatable)
    #[arg(short, long, value_name = "SRC:DIR[:ro]")]
    volume: Vec<String>,
    /// Memory as a folder (repeatable)
    #[arg(long, value_name = "DIR[:size=64M]")]
    tmpfs: Vec<String>,
    /// Nothing may be written but to volumes and memory
    #[arg(long)]
    read_only: bool,
    /// The guest's name [default: the image's, else the VM's]
    #[arg(short = 'H', long, value_name = "NAME")]
    hostname: Option<String>,
    /// Let a port of the host be one of the guest's (repeatable)
    #[arg(short, long, value_name = "[IP:]HOST:GUEST[/udp]")]
    publish: Vec<String>,
    /// The network: sockets of the user's own (by passt), a TAP device, or none
    /// [default: user]
    #[arg(long, value_name = "user|none|tap=NAME,ip=CIDR[,gateway=IP]")]
    net: Option<String>,
    /// Let the guest reach nothing but this (repeatable)
    #[arg(long, value_name = "CIDR|DOMAIN[:PORT]")]
    allow: Vec<String>,
    /// The guest's resolver [default: the host's] (repeatable)
    #[arg(long, value_name = "IP")]
    dns: Vec<IpAddr>,
    /// vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<String>,
    /// Memory: 512M, 2G; a plain number is MiB [default: 512M]
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<String>,
    /// Keep what is written on a disk of that size, not in memory
    #[arg(long, value_name = "SIZE")]
    disk_size: Option<String>,
    /// End the VM after that long: 10s, 5m, 1h; a plain number is seconds
    #[arg(long, value_name = "TIME")]
    timeout: Option<String>,
    /// Another kernel
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Print on standard error how long each phase took
    #[arg(long)]
    timing: bool,
    /// Print one JSON record at the end, as the last line of standard output
    #[arg(long)]
    json: bool,
    /// This is the process in the background, and this its VM's name
    #[arg(long, hide = true)]
    detached: Option<String>,
    /// Only see to it that the image and volumes are there, and print folders to write to
    #[arg(long, hide = true)]
    only_obtain: bool,
    /// A name in the store or of a registry; the path of an archive, an OCI layout
    /// or a root folder, if it begins with / or .
    #[arg(value_name = "IMAGE")]
    image: String,
    /// What to run [default: the image's]
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    command: Vec<String>,
}

/// Runs an image; mayfly's own failures have a status that commands hardly use.
pub fn run(args: Args, timeline: Timeline) -> ExitCode {
    let options = Options {
        remove: args.rm,
        interactive: args.interactive,
        terminal: args.tty,
        detach: args.detach && args.detached.is_none(),
        detached: args.detached.is_some(),
        only_obtain: args.only_obtain,
        name: args.detached.or(args.name),
        environment: args.env,
        environment_files: args.env_file,
        folder: args.workdir,
        user: args.user,
        entrypoint: args.entrypoint,
        volumes: args.volume,
        tmpfs: args.tmpfs,
        read_only: args.read_only,
        hostname: args.hostname,
        publish: args.publish,
        net: args.net,
        allow: args.allow,
        dns: args.dns,
        cpus: args.cpus,
        memory: args.memory,
        disk_size: args.disk_size,
        timeout: args.timeout,
        kernel: args.kernel,
        timing: args.timing,
        json: args.json,
        image: args.image,
        command: args.command,
    };
    let status = run::run(options, timeline).unwrap_or_else(|failure| {
        super::report(&failure);
        run::STATUS_FAILED
    });
    ExitCode::from(status)
}
