//! `mayfly run`: an image's command in a VM of its own.
//!
//! The machine runs on the main thread, as in `mayfly boot`; a session on
//! another one talks to the guest's agent, and learns how the command ended.

pub mod agent;
mod background;
mod cidfile;
mod copy;
pub mod detach;
mod docker;
pub mod end;
mod environment;
mod exec;
mod force_quit;
mod limits;
pub mod log;
mod mount;
mod network;
mod options;
mod plan;
mod process;
pub mod record;
mod resolver;
mod session;
mod standard;
mod start;
mod status;
mod sysctl;
pub mod template;
mod text;
mod tmpfs;
mod usage;
mod volumes;
mod wish;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use mayfly_image::{Image, LAYER_ROOT, Progress, PullOptions, Quiet, Store};
use mayfly_protocol::agent::{Exit, Mount, Net, PORT};
use mayfly_text::printable;
use serde_json::json;

pub use self::copy::{CopyOptions, cp};
pub use self::exec::{ExecOptions, attach, exec};
pub use self::options::Options;
pub use self::plan::{Plan, signal, time};
pub use self::status::{STATUS_FAILED, STATUS_TIMEOUT};
pub use self::usage::Usage;

use self::cidfile::CidFile;
use self::log::Log;
use self::options::{Mode, Pull};
use self::record::{Ended, NotCreated, Record, VmDir, VmDirGuard};
use self::session::{Session, SessionEnd};
use self::start::Start;
use self::status::signalled;
use self::text::Text;
use self::volumes::Volumes;
use crate::arguments;
use crate::config::{
    CPUS_DEFAULT, ConsoleConfig, DiskConfig, FromKeys, GuestFiles, HostEnd, HostFacts,
    MachineConfig, MachineOptions, NetConfig, VsockConfig, parse_cpus,
};
use crate::data_folder::data_folder;
use crate::failure::{Class, Failure, OrFail};
use crate::guests;
use crate::link::{Ending, Outcome};
use crate::net::publish::{Reserved, summary};
use crate::progress_bars::Bars;
use crate::signals::{self, StartSignals};
use crate::spec::MemorySpec;
use crate::supervisor::Supervisor;
use crate::timing::{Timeline, TimingUs, now_ms};
use crate::unix_socket;
use crate::volume::{Journal, make_ext4};

/// What init's lines on the console begin with.
const INIT_SAYS: &str = "mayfly-init: ";
/// Every guest is the only one on its device.
const CID: u32 = 3;
/// The name of the disk for what a guest writes.
const SCRATCH: &str = "scratch";

/// Runs an image's command in a VM, and returns the status to exit with. `words` are
/// those of the command line behind the verb.
pub fn run(options: Options, words: &[OsString], timeline: Timeline) -> Result<u8, Failure> {
    let mut options = options.sort()?;
    options.read_files()?;
    let options = &options;
    let mode = options.mode();
    options.docker.check()?;
    exec::check_terminal(options.interactive && options.terminal && mode == Mode::Foreground)?;
    let host = HostFacts::look_up();
    let mut network = network::network(options, &host)?;
    if let Some((_, guest)) = &mut network {
        resolver::complete(guest, options)?;
    }
    if mode == Mode::Foreground || mode == Mode::Detach {
        options.cidfile.as_deref().map_or(Ok(()), cidfile::check)?;
    }
    let image = obtain(options)?;
    if mode == Mode::Obtain {
        for folder in Volumes::find(&options.volumes, &options.mounts, &options.tmpfs)?.written {
            let name = [folder.as_os_str().as_bytes(), b"\0"].concat();
            io::stdout().write_all(&name).or_host("standard output")?;
        }
        return Ok(0);
    }
    let plan = Plan::new(options, &image.config.config)?;
    if mode == Mode::Detach {
        return background::detach(&plan.name, &options.from_environment_files, words);
    }
    run_here(options, plan, &image, (network, &host), (timeline, words))
}

/// The image, from where `--pull` lets it come from.
fn obtain(options: &Options) -> Result<Image, Failure> {
    let name = options.image.as_str();
    let progress: Box<dyn Progress> = match options.quiet {
        true => Box::new(Quiet),
        false => Box::new(Bars::new()),
    };
    let store = Store::open(&data_folder()?)?;
    let is_path = name.starts_with(['/', '.']);
    // What runs in the background was asked for in the foreground, and got.
    let pull = match options.mode() {
        Mode::Background => Pull::Missing,
        _ => options.pull,
    };
    match pull {
        Pull::Always if !is_path => {
            let reference = name.parse().or_config("image")?;
            Ok(store.pull(&reference, &PullOptions::default(), &*progress)?)
        }
        Pull::Never if !is_path => store.find(name)?.ok_or_else(|| {
            Failure::config(format!(
                "{name}: is not in the store, and --pull never is given"
            ))
        }),
        _ => Ok(store.obtain(name, &PullOptions::default(), &*progress)?),
    }
}

/// Makes the VM's folder. A name that the user did not choose may be another VM's: then there
/// is another.
fn create_vm_dir(
    options: &Options,
    plan: &mut Plan,
    (image, ports): (&Image, &[String]),
    signals: &StartSignals,
) -> Result<VmDirGuard, Failure> {
    const TRIES: usize = 16;
    let mut unnamed = options.clone();
    unnamed.detached = None;
    for _ in 1..TRIES {
        match VmDir::create(&record(options, plan, image, ports), signals) {
            Err(NotCreated::Taken(_)) if options.name.is_none() => {
                *plan = Plan::new(&unnamed, &image.config.config)?;
            }
            created => return created.map_err(NotCreated::into_failure),
        }
    }
    let vm_dir = VmDir::create(&record(options, plan, image, ports), signals);
    vm_dir.map_err(NotCreated::into_failure)
}

fn run_here(
    options: &Options,
    mut plan: Plan,
    image: &Image,
    (network, host): (Option<(NetConfig, Net)>, &HostFacts),
    (timeline, words): (Timeline, &[OsString]),
) -> Result<u8, Failure> {
    let guest = guest_files(options)?;
    let mut machine = machine_options(options)?;
    let (texts, mounts, tmpfs) = (&options.volumes, &options.mounts, &options.tmpfs);
    let volumes = Volumes::find(texts, mounts, tmpfs)?;
    let others = plan.setup.mounts.iter().chain(&volumes.mounts);
    let of_image = volumes::of_image(&image.config.config.volumes, others)?;
    // Open until the machine has it open.
    let scratch = plan.disk_size.map(|size| make_scratch(size, options));
    let scratch = scratch.transpose()?;
    // From here on there is something to be removed: a signal ends the start in order.
    let signals = StartSignals::take().or_internal("blocking signals")?;
    // Free until the machine has them.
    let network = network.map(|(mut device, guest)| {
        let reserved = device.choose_ports()?;
        Ok::<_, Failure>((device, reserved, guest))
    });
    let network = network.transpose()?;
    let ports = network.as_ref();
    let ports = ports.map_or(Vec::new(), |(device, ..)| summary(device.ports()));
    let owned = create_vm_dir(options, &mut plan, (image, &ports), &signals)?;
    for layer in &image.layers {
        let len = layer.metadata().or_host(layer.display())?.len();
        plan.setup.layers.push(len);
    }
    plan.setup.layer_root = LAYER_ROOT.to_owned();
    plan.setup.mounts.extend(volumes.mounts);
    plan.setup.mounts.extend(of_image);
    // What is in another comes behind it.
    let depth = |mount: &Mount| mount.target.iter().filter(|&&byte| byte == b'/').count();
    plan.setup.mounts.sort_by_key(depth);
    let cidfile = CidFile::write(options.cidfile.as_deref(), &plan.name)?;
    machine.name = Some(plan.name.clone());
    machine.vsock = Some(VsockConfig {
        cid: CID,
        path: owned.vm_dir.vsock(),
    });
    machine.layers = image.layers.clone();
    if let Some(file) = &scratch {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        let disk = DiskConfig::of_volume(path, false, scratch_flag(options), SCRATCH);
        machine.disks.push(disk);
    }
    machine.disks.extend(volumes.disks);
    machine.folders = volumes.folders;
    let reserved = network.map(|(device, reserved, guest)| {
        plan.setup.net = Some(guest);
        machine.nets.push(device);
        reserved
    });
    let config = machine.validate(guest, host)?;
    plan.setup.scratch = config.spec.disk_path(SCRATCH);
    Volumes::locate(&mut plan.setup.mounts, &config.spec);
    let result = run_machine(
        options,
        plan,
        (&config, reserved),
        &owned,
        (timeline, &signals),
    );
    let end = match result? {
        Run::Ended(end) => end,
        Run::Again(why) => {
            drop((owned, cidfile));
            return Err(boot_instead(&why, words));
        }
    };
    cidfile.keep();
    let ended = Ended {
        at_ms: now_ms(),
        status: end.status,
        reason: end.reason.clone(),
        last_lines: end.last_lines.clone(),
        problems: end.problems.clone(),
    };
    if let Err(failure) = owned.end(ended) {
        let _ = writeln!(io::stderr(), "mayfly: {failure}");
    }
    Ok(end.status)
}

/// Starts again, without a template. Returns only if that fails.
fn boot_instead(why: &str, words: &[OsString]) -> Failure {
    const WHAT: &str = "booting instead";
    if let Err(error) = signals::let_through() {
        return Failure::new(Class::Internal, format!("{WHAT}: {error}"));
    }
    let cold = ["--cold", "--cold-because", why].map(OsString::from);
    let words = [&cold, words].concat();
    Failure::host(format!("{WHAT}: {}", arguments::run_again(&words)))
}

/// What came of a machine.
enum Run {
    /// It ended.
    Ended(End),
    /// It came from a template that is of no use, and nothing has happened: it is to be booted.
    Again(String),
}

struct End {
    status: u8,
    reason: Option<String>,
    last_lines: Vec<String>,
    /// What had failed before.
    problems: Vec<String>,
}

impl End {
    fn new(status: u8, reason: Option<String>) -> Self {
        End {
            status,
            reason,
            last_lines: Vec::new(),
            problems: Vec::new(),
        }
    }
}

/// Starts the machine and follows its session to the end.
fn run_machine(
    options: &Options,
    plan: Plan,
    (config, reserved): (&MachineConfig, Option<Reserved>),
    owned: &VmDirGuard,
    (timeline, signals): (Timeline, &StartSignals),
) -> Result<Run, Failure> {
    let start = Start::choose(options, config);
    let (snapshot, has_frames) = start.files(&plan)?;
    let started_us = timeline.started_us();
    let vm_dir = &owned.vm_dir;
    let name = plan.name.clone();
    let memory = memory_text(options);
    let mut agent_socket = vm_dir.vsock().into_os_string();
    agent_socket.push(format!("_{PORT}"));
    let (listener, socket) =
        unix_socket::listen(&PathBuf::from(agent_socket), "the agent's socket")?;
    let (log, _written) = vm_dir.make_log()?;
    let log = Log::create(&log, plan.log_size).or_host("the log")?;
    // Before there are other threads.
    let supervisor = match Supervisor::start(config, snapshot, timeline, signals) {
        Ok(supervisor) => supervisor,
        Err(failure) => {
            return match start.why_not_started(&failure) {
                Some(fault) => Ok(Run::Again(start.discard(fault))),
                None => Err(failure),
            };
        }
    };
    let start = start.settle(supervisor.origin());
    let has_frames = has_frames && start.why_cold().is_none();
    drop(reserved);
    let (board, vm_dir) = (supervisor.board(), vm_dir.clone());
    board.observe(move |status| {
        if let Err(error) = vm_dir.set_status(status) {
            ::log::warn!("writing down how the VM does: {error}");
        }
    });
    let problems = board.clone();
    log.on_failure(move |problem| problems.add_problem(problem));
    let session = Session::start(
        options,
        plan,
        (listener, socket),
        log,
        session::Machine {
            stop: supervisor.stop_handle(),
            restored: start.why_cold().is_none(),
            has_frames,
        },
    )?;
    let answered = session.answered();
    let ending = supervisor.run();
    let end = session.end();
    if let Some(fault) = start.why_again(answered.get(), &end, &ending) {
        return Ok(Run::Again(start.discard(fault)));
    }
    let ending = ending.map_err(|failure| match end {
        // It was ended before the guest ran, or did not heed it.
        SessionEnd::Signalled(signal) => Failure::signalled(signal),
        _ => failure,
    })?;
    if matches!(end, SessionEnd::Exited(_)) {
        start.make_missing();
    }
    let end = End {
        problems: board.status().problems,
        ..judge(&end, &ending, &name, &memory)
    };
    tell(options, &name, &end, &ending, start.why_cold());
    let printed = match options.json {
        true => print_record(&name, &end, &ending, start.why_cold(), started_us),
        false => Ok(()),
    };
    // Who asked for the record must not take its absence for success.
    if let Err(error) = printed
        && error.kind() != io::ErrorKind::BrokenPipe
        && end.status == 0
    {
        let _ = writeln!(io::stderr(), "mayfly: standard output: {error}");
        return Ok(Run::Ended(End {
            status: STATUS_FAILED,
            ..end
        }));
    }
    Ok(Run::Ended(end))
}

/// Tells the user on standard error how a VM began and ended, as far as that was asked for or
/// is not as it should be.
fn tell(options: &Options, name: &str, end: &End, ending: &Ending, why_cold: Option<&str>) {
    if options.timing {
        let _ = write!(io::stderr(), "{}", ending.timeline);
    }
    if options.verbose {
        let how = match why_cold {
            None => "it started from a template".to_owned(),
            Some(why) => format!("it booted: {why}"),
        };
        let _ = writeln!(io::stderr(), "mayfly: {name}: {how}");
    }
    if let Some(reason) = &end.reason {
        let what_follows = match end.last_lines.is_empty() {
            true => "",
            false => "; its last lines:",
        };
        let _ = writeln!(io::stderr(), "mayfly: {reason}{what_follows}");
    }
    for line in &end.last_lines {
        let _ = writeln!(io::stderr(), "  {line}");
    }
}

/// Prints the record of a run, for `--json`.
fn print_record(
    name: &str,
    end: &End,
    ending: &Ending,
    why_cold: Option<&str>,
    started_us: u64,
) -> io::Result<()> {
    let record = json!({
        "name": name,
        "exit_code": end.status,
        "reason": end.reason,
        "start": match why_cold {
            None => "warm",
            Some(_) => "cold",
        },
        "cold_because": why_cold,
        "started_us": started_us,
        "timing_us": TimingUs::from(&ending.timeline),
    });
    writeln!(io::stdout(), "{}", printable::json(&record.to_string()))
}

/// What to exit with, and what to say.
fn judge(session: &SessionEnd, ending: &Ending, name: &str, memory: &str) -> End {
    let said = |status, reason: String| End::new(status, Some(reason));
    match session {
        SessionEnd::Exited(Exit {
            status,
            out_of_memory: true,
        }) => said(
            *status,
            format!("{name} ran out of memory ({memory}); give it more with --memory"),
        ),
        SessionEnd::Exited(exit) => End::new(exit.status, None),
        SessionEnd::TimedOut(after) => said(
            STATUS_TIMEOUT,
            format!(
                "{name} was ended after {} s, as --timeout says",
                after.as_secs()
            ),
        ),
        SessionEnd::Silent if ending.outcome == Outcome::PowerOff => End {
            last_lines: words_of_init(&ending.last_lines),
            ..said(
                STATUS_FAILED,
                format!("{name} turned itself off before its command ended"),
            )
        },
        SessionEnd::Silent => judge(
            &SessionEnd::Failed(STATUS_FAILED, "the guest ended without a word".into()),
            ending,
            name,
            memory,
        ),
        SessionEnd::Signalled(signal) => End::new(signalled(*signal), None),
        SessionEnd::Failed(status, reason) => match &ending.outcome {
            Outcome::Panic => End {
                last_lines: ending.last_lines.clone(),
                ..said(
                    STATUS_FAILED,
                    format!("{name}: the guest's kernel panicked"),
                )
            },
            Outcome::Crash(why) => End {
                last_lines: ending.last_lines.clone(),
                ..said(STATUS_FAILED, format!("{name}: the guest crashed: {why}"))
            },
            Outcome::Forced => said(signalled(libc::SIGKILL), format!("{name} was ended")),
            Outcome::Internal(why) => said(STATUS_FAILED, format!("{name}: {why}")),
            _ => said(*status, format!("{name}: {reason}")),
        },
    }
}

/// What the agent could not tell over its connection, among what Linux says.
fn words_of_init(last_lines: &[String]) -> Vec<String> {
    let own = last_lines.iter().filter(|line| line.starts_with(INIT_SAYS));
    own.cloned().collect()
}

fn record(options: &Options, plan: &Plan, image: &Image, ports: &[String]) -> Record {
    let text = |bytes: &Vec<u8>| Text(bytes.clone());
    let variables = plan.process.environment.iter();
    let volumes = options.volumes.iter().chain(&options.mounts);
    Record {
        name: plan.name.clone(),
        image: options.image.clone(),
        image_id: image.id.to_string(),
        command: plan.process.arguments.iter().map(text).collect(),
        environment: variables
            .map(|(name, value)| (text(name), text(value)))
            .collect(),
        user: plan.process.user.clone(),
        groups: plan.process.groups.clone(),
        folder: text(&plan.process.folder),
        terminal: options.terminal,
        volumes: volumes.map(Text::from).collect(),
        ports: ports.to_vec(),
        cpus: options
            .cpus
            .clone()
            .unwrap_or_else(|| CPUS_DEFAULT.to_string()),
        memory: memory_text(options),
        stop_signal: plan.stop_signal,
        stop_timeout: options.stop_timeout,
        limits: plan.process.limits.clone(),
        no_new_privileges: plan.process.no_new_privileges,
        labels: labels(options, image),
        created_ms: now_ms(),
        pid: std::process::id(),
        pid_started: process::started(std::process::id()),
        remove: options.remove,
        ended: None,
    }
}

/// The image's labels and the user's, which win.
fn labels(options: &Options, image: &Image) -> BTreeMap<String, Text> {
    let of_image = image.config.config.labels.iter();
    let of_image = of_image.map(|(name, value)| (name.clone(), Text(value.clone().into())));
    let own = options.labels.iter().map(|label| {
        let (name, value) = arguments::split_at(label, b'=');
        (
            String::from_utf8_lossy(name).into_owned(),
            Text(value.unwrap_or_default().to_vec()),
        )
    });
    of_image.chain(own).collect()
}

/// The kernel, and the initramfs with our init and its modules.
fn guest_files(options: &Options) -> Result<GuestFiles, Failure> {
    let guest = guests::ensure_default()?;
    let initrd = guest.run_initrd().ok_or_else(|| {
        Failure::config(format!(
            "the guest {} has no initial RAM disk for images; make it anew with mayfly guest make",
            guest.name()
        ))
    })?;
    let kernel = options.kernel.clone().unwrap_or_else(|| guest.kernel());
    Ok(GuestFiles::named(&kernel, Some(&initrd)))
}

/// What the user's flags say of the machine itself.
fn machine_options(options: &Options) -> Result<MachineOptions, Failure> {
    let cpus = options.cpus.as_deref().map(parse_cpus).transpose()?;
    let memory = options.memory.as_deref().map(|text| {
        let memory = MemorySpec::from_text(text.as_ref());
        memory.map_err(|why| Failure::config(format!("--memory {text}: {why}")))
    });
    Ok(MachineOptions {
        cpus: cpus.unwrap_or(CPUS_DEFAULT),
        memory: memory.transpose()?.unwrap_or_default(),
        console: ConsoleConfig {
            end: HostEnd::None,
            virtio: false,
        },
        cmdline: Some("-- agent".to_owned()),
        ignores_signals: true,
        sandbox: options.sandbox.unwrap_or_default(),
        nested: options.nested,
        accept_kvm: options.accept_kvm,
        ..MachineOptions::default()
    })
}

/// A VM's memory as the user wrote it, or the default.
fn memory_text(options: &Options) -> String {
    let default = || format!("{}M", MemorySpec::default().size >> 20);
    options.memory.clone().unwrap_or_else(default)
}

fn scratch_flag(options: &Options) -> String {
    let given = options.disk_size.as_deref().unwrap_or_default();
    format!("--disk-size {given}")
}

/// Makes the disk for what a VM writes: where the user keeps data, as memory is
/// what it is to save, and without a name, so that it goes with the VM.
fn make_scratch(size: u64, options: &Options) -> Result<File, Failure> {
    let what = scratch_flag(options);
    let file = tempfile::tempfile_in(data_folder()?).or_host(&what)?;
    // As another process can find it, too.
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    make_ext4(Path::new(&path), size, Journal::No, &what)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_a_guest_s_init_are_told() {
        let line = |text: &str| text.to_owned();
        let ending = Ending {
            outcome: Outcome::PowerOff,
            guest_status: Some(STATUS_FAILED),
            last_lines: vec![
                line("[    0.1] Linux says much"),
                line("mayfly-init: talking to the host: not a process"),
                line("[    0.3] reboot: Power down"),
            ],
            timeline: Timeline::start(),
        };
        let end = judge(&SessionEnd::Silent, &ending, "vm", "512M");
        assert_eq!(end.status, STATUS_FAILED);
        assert_eq!(
            end.last_lines,
            ["mayfly-init: talking to the host: not a process"]
        );
    }
}
