//! From an image and the user's wishes to a machine, its setup and its process.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

use mayfly_image::RunConfig;
use mayfly_protocol::agent::{Limit, Mount, Process, Setup, Source};

use super::environment::{self, Wishes};
use super::limits;
use super::log;
use super::options::Options;
use super::sysctl;
use super::tmpfs::tmpfs;
use crate::config::parse_size;
use crate::failure::Failure;

/// Where programs share memory.
const SHARED_MEMORY: &str = "/dev/shm";
const SIGTERM: i32 = libc::SIGTERM;
/// A plain number of a disk's size counts MiB.
const MIB: u32 = 20;
/// The longest name of a machine (Linux' `HOST_NAME_MAX`).
const HOSTNAME_MAX: usize = 63;

/// What becomes of an image and options.
#[derive(Debug)]
pub struct Plan {
    /// The VM's name.
    pub name: String,
    /// The guest's parts, but for the layers' lengths.
    pub setup: Setup,
    /// The main process, but for its terminal.
    pub process: Process,
    /// What asks it to end.
    pub stop_signal: i32,
    /// How long it may run.
    pub timeout: Option<Duration>,
    /// The size of a disk for what is written.
    pub disk_size: Option<u64>,
    /// How much of its output is kept.
    pub log_size: u64,
}

/// How much of a command's output is to be kept.
fn log_size(text: &str) -> Result<u64, Failure> {
    parse_size(text, MIB).map_err(|error| Failure::config(format!("--log-size {text}: {error}")))
}

impl Plan {
    /// Puts an image's wishes and the user's together: the user's win.
    pub fn new(options: &Options, image: &RunConfig) -> Result<Self, Failure> {
        let name = match options.name() {
            Some(name) if crate::control::valid_name(name) => name.clone(),
            Some(name) => {
                return Err(Failure::config(format!(
                    "--name {name}: write 1 to {} letters, digits, and . _ -",
                    crate::control::NAME_MAX
                )));
            }
            None => invented_name(&options.image),
        };
        let hostname = hostname(options, image, &name)?;
        let folder = folder(options, image)?;
        let mut mounts = options.tmpfs.iter().map(|text| tmpfs(text));
        let mut mounts: Vec<Mount> = mounts.by_ref().collect::<Result<_, _>>()?;
        mounts.extend(options.shm_size.as_deref().map(shared_memory).transpose()?);
        let size = |text: &String| {
            let size = parse_size(text, MIB);
            size.map_err(|error| Failure::config(format!("--disk-size {text}: {error}")))
        };
        let wishes = Wishes {
            flags: &options.environment,
            from_files: &options.from_environment_files,
            terminal: options.terminal,
        };
        let given = environment::of_image(&image.env, &hostname, &wishes);
        Ok(Plan {
            setup: Setup {
                read_only: options.read_only,
                hostname,
                hosts: options
                    .add_host
                    .iter()
                    .map(|text| host(text))
                    .collect::<Result<_, _>>()?,
                mounts,
                folder: folder.clone(),
                sysctls: options
                    .sysctls
                    .iter()
                    .map(|text| sysctl::parse(text))
                    .collect::<Result<_, _>>()?,
                ..Setup::default()
            },
            process: Process {
                arguments: arguments(options, image)?,
                environment: wishes.onto(given)?,
                folder,
                user: options.user.as_ref().unwrap_or(&image.user).clone(),
                groups: options.group_add.clone(),
                limits: limits(&options.ulimit)?,
                no_new_privileges: options.docker.no_new_privileges()?,
                terminal: None,
                input: options.interactive,
            },
            name,
            stop_signal: stop_signal(options, image)?,
            timeout: options.timeout.as_deref().map(time).transpose()?,
            disk_size: options.disk_size.as_ref().map(size).transpose()?,
            log_size: match &options.log_size {
                Some(text) => log_size(text)?,
                None => log::SIZE,
            },
        })
    }
}

/// The guest's name: whoever chose it is named where it is none.
fn hostname(options: &Options, image: &RunConfig, name: &str) -> Result<String, Failure> {
    let (hostname, whose) = match (&options.hostname, image.hostname.as_str()) {
        (Some(hostname), _) => (hostname.clone(), "--hostname"),
        (None, "") => (name.chars().take(HOSTNAME_MAX).collect(), "--name"),
        (None, hostname) => (hostname.to_owned(), "the image's hostname"),
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    match hostname.is_empty() || hostname.len() > HOSTNAME_MAX || !hostname.bytes().all(plain) {
        true => Err(Failure::config(format!(
            "{whose} {}: a hostname has 1 to {HOSTNAME_MAX} letters, digits, and . - _",
            hostname.escape_debug()
        ))),
        false => Ok(hostname),
    }
}

/// Where the command runs. An image's folder may lack the slash, as in Docker.
fn folder(options: &Options, image: &RunConfig) -> Result<Vec<u8>, Failure> {
    match &options.folder {
        Some(folder) if folder.is_empty() => Ok(Vec::new()),
        Some(folder) if !folder.as_bytes().starts_with(b"/") => Err(Failure::config(format!(
            "-w {}: must begin with a slash",
            folder.display()
        ))),
        Some(folder) => Ok(folder.as_bytes().to_vec()),
        None => Ok(match image.working_dir.as_str() {
            folder if folder.is_empty() || folder.starts_with('/') => folder.into(),
            folder => format!("/{folder}").into_bytes(),
        }),
    }
}

fn stop_signal(options: &Options, image: &RunConfig) -> Result<i32, Failure> {
    let (text, whose) = match (&options.stop_signal, image.stop_signal.as_str()) {
        (Some(text), _) => (text.as_str(), "--stop-signal"),
        (None, "") => return Ok(SIGTERM),
        (None, text) => (text, "the image's STOPSIGNAL"),
    };
    signal(text).ok_or_else(|| {
        Failure::config(format!(
            "{whose} {}: is no signal; write a name such as INT, or a number",
            text.escape_debug()
        ))
    })
}

/// The limits that a user wants.
pub fn limits(texts: &[String]) -> Result<Vec<Limit>, Failure> {
    let one = |text: &String| {
        let limit = limits::parse(text);
        limit.map_err(|why| Failure::config(format!("--ulimit {text}: {why}")))
    };
    texts.iter().map(one).collect()
}

/// `NAME:IP`, or `NAME=IP`.
fn host(text: &str) -> Result<(String, IpAddr), Failure> {
    let failed = |why: &str| Failure::config(format!("--add-host {text}: {why}"));
    let (name, address) = text
        .split_once(['=', ':'])
        .ok_or_else(|| failed("write NAME:IP"))?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if name.is_empty() || !name.bytes().all(plain) {
        return Err(failed("a name has letters, digits, and . - _"));
    }
    if address == "host-gateway" {
        return Err(failed(
            "the host is no neighbour of a VM; give the address of a service that is to be reached",
        ));
    }
    let inner = address
        .strip_prefix('[')
        .and_then(|it| it.strip_suffix(']'));
    let address = inner.unwrap_or(address).parse();
    let address = address.map_err(|_| failed("write NAME:IP, such as db:192.0.2.7"))?;
    Ok((name.to_owned(), address))
}

fn shared_memory(text: &str) -> Result<Mount, Failure> {
    // As in Docker, where a plain number is bytes.
    let size = parse_size(text, 0);
    let size = size.map_err(|error| Failure::config(format!("--shm-size {text}: {error}")))?;
    Ok(Mount {
        target: SHARED_MEMORY.into(),
        source: Source::Tmpfs {
            options: format!("mode=1777,size={size}"),
            no_exec: true,
        },
        read_only: false,
    })
}

/// Entrypoint and command, as Docker has them: another entrypoint takes the
/// image's command with it.
fn arguments(options: &Options, image: &RunConfig) -> Result<Vec<Vec<u8>>, Failure> {
    let of_image = |words: &[String]| words.iter().map(OsString::from).collect();
    let (mut all, command): (Vec<OsString>, _) = match &options.entrypoint {
        Some(program) if program.is_empty() => (Vec::new(), options.command.clone()),
        Some(program) => (vec![program.clone()], options.command.clone()),
        None if options.command.is_empty() => (of_image(&image.entrypoint), of_image(&image.cmd)),
        None => (of_image(&image.entrypoint), options.command.clone()),
    };
    all.extend(command);
    match all.is_empty() {
        true => Err(Failure::config(format!(
            "{}: the image names no command; give one",
            options.image
        ))),
        false => Ok(all.into_iter().map(OsString::into_vec).collect()),
    }
}

/// A signal, by its number or its name with or without `SIG`, as Docker knows them:
/// systemd's images ask for `SIGRTMIN+3`, others' for `SIGPWR`.
pub fn signal(text: &str) -> Option<i32> {
    const NAMES: [(&str, i32); 34] = [
        ("HUP", libc::SIGHUP),
        ("INT", libc::SIGINT),
        ("QUIT", libc::SIGQUIT),
        ("ILL", libc::SIGILL),
        ("TRAP", libc::SIGTRAP),
        ("ABRT", libc::SIGABRT),
        ("IOT", libc::SIGABRT),
        ("BUS", libc::SIGBUS),
        ("FPE", libc::SIGFPE),
        ("KILL", libc::SIGKILL),
        ("USR1", libc::SIGUSR1),
        ("SEGV", libc::SIGSEGV),
        ("USR2", libc::SIGUSR2),
        ("PIPE", libc::SIGPIPE),
        ("ALRM", libc::SIGALRM),
        ("TERM", libc::SIGTERM),
        ("STKFLT", libc::SIGSTKFLT),
        ("CHLD", libc::SIGCHLD),
        ("CLD", libc::SIGCHLD),
        ("CONT", libc::SIGCONT),
        ("STOP", libc::SIGSTOP),
        ("TSTP", libc::SIGTSTP),
        ("TTIN", libc::SIGTTIN),
        ("TTOU", libc::SIGTTOU),
        ("URG", libc::SIGURG),
        ("XCPU", libc::SIGXCPU),
        ("XFSZ", libc::SIGXFSZ),
        ("VTALRM", libc::SIGVTALRM),
        ("PROF", libc::SIGPROF),
        ("WINCH", libc::SIGWINCH),
        ("IO", libc::SIGIO),
        ("POLL", libc::SIGIO),
        ("PWR", libc::SIGPWR),
        ("SYS", libc::SIGSYS),
    ];
    const MAX: i32 = 64;
    if let Ok(number) = text.parse() {
        return (1..=MAX).contains(&number).then_some(number);
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let real_time = |rest: &str, from: i32, sign: char| {
        let by = match rest {
            "" => 0,
            rest => rest.strip_prefix(sign)?.parse::<u8>().ok()?,
        };
        let by = i32::from(by);
        let number = if sign == '+' { from + by } else { from - by };
        let known = libc::SIGRTMIN()..=libc::SIGRTMAX();
        known.contains(&number).then_some(number)
    };
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return real_time(rest, libc::SIGRTMIN(), '+');
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return real_time(rest, libc::SIGRTMAX(), '-');
    }
    NAMES.iter().find(|(it, _)| *it == name).map(|&(_, it)| it)
}

/// A hundred years.
const TIMEOUT_MAX: u64 = 100 * 366 * 24 * 3600;

/// A time, of the flag `--timeout`: seconds, or with a unit.
pub fn time(text: &str) -> Result<Duration, Failure> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        _ => (text, 1),
    };
    let seconds = number
        .parse::<u64>()
        .ok()
        .and_then(|it| it.checked_mul(unit));
    match seconds {
        Some(seconds @ 1..=TIMEOUT_MAX) => Ok(Duration::from_secs(seconds)),
        _ => Err(Failure::config(format!(
            "--timeout {text}: write a time such as 10s, 5m or 1h"
        ))),
    }
}

/// A name for a VM that the user did not name: its image's, and a number.
fn invented_name(image: &str) -> String {
    let name = image.rsplit('/').next().unwrap_or_default();
    let name = name.split([':', '@']).next().unwrap_or_default();
    let plain = |it: char| it.is_ascii_alphanumeric() || "._-".contains(it);
    let name: String = name.chars().filter(|&it| plain(it)).take(40).collect();
    let name = match name.trim_start_matches(['.', '-']) {
        "" => "vm",
        name => name,
    };
    let mut random = [0; 4];
    let read = fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random));
    match read {
        Ok(()) => format!("{name}-{:08x}", u32::from_le_bytes(random)),
        Err(_) => format!("{name}-{}", std::process::id()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> RunConfig {
        RunConfig {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["default".into()],
            env: vec!["A=1".into(), "PATH=/x".into()],
            working_dir: "/srv".into(),
            user: "web".into(),
            stop_signal: "SIGQUIT".into(),
            ..RunConfig::default()
        }
    }

    fn options(change: impl FnOnce(&mut Options)) -> Options {
        let mut options = Options {
            image: "example/web:1".into(),
            ..Options::default()
        };
        change(&mut options);
        options
    }

    fn words(options: &Options) -> Vec<String> {
        let plan = Plan::new(options, &image()).unwrap();
        let words = plan.process.arguments.into_iter();
        words.map(|it| String::from_utf8(it).unwrap()).collect()
    }

    #[test]
    fn commands_are_docker_s() {
        assert_eq!(words(&options(|_| {})), ["/entry", "default"]);
        let command = |it: &mut Options| it.command = vec!["-x".into()];
        assert_eq!(words(&options(command)), ["/entry", "-x"]);
        let other = |it: &mut Options| it.entrypoint = Some("sh".into());
        assert_eq!(words(&options(other)), ["sh"]);
        let none = |it: &mut Options| {
            it.entrypoint = Some(OsString::new());
            it.command = vec!["ls".into()];
        };
        assert_eq!(words(&options(none)), ["ls"]);
        let empty = Plan::new(&options(|_| {}), &RunConfig::default());
        assert!(empty.unwrap_err().to_string().contains("no command"));
    }

    #[test]
    fn the_user_s_wishes_win() {
        let plan = Plan::new(&options(|_| {}), &image()).unwrap();
        assert_eq!(plan.process.folder, b"/srv");
        assert_eq!(plan.process.user, "web");
        assert_eq!(plan.stop_signal, libc::SIGQUIT);
        assert!(plan.name.starts_with("web-"), "{}", plan.name);
        let wishes = options(|it| {
            it.environment = vec!["A=2".into(), "B=x=y".into(), "A=3".into()];
            it.folder = Some("/w".into());
            it.user = Some("0:0".into());
            it.name = Some("n".into());
            it.timeout = Some("2m".into());
        });
        let plan = Plan::new(&wishes, &image()).unwrap();
        let value = |name: &str| {
            let mut all = plan.process.environment.iter();
            let (_, value) = all.find(|(it, _)| it == name.as_bytes()).unwrap();
            String::from_utf8(value.clone()).unwrap()
        };
        assert_eq!(
            [value("A"), value("B"), value("PATH"), value("HOSTNAME")],
            ["3", "x=y", "/x", "n"]
        );
        assert_eq!(plan.process.folder, b"/w");
        assert_eq!(plan.process.user, "0:0");
        assert_eq!(plan.timeout, Some(Duration::from_secs(120)));
    }

    #[test]
    fn words_are_bytes() {
        let bytes = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        let wishes = options(|it| {
            it.command = vec!["--help".into(), "--".into(), bytes(b"gr\xfcn")];
            it.folder = Some(bytes(b"/\xfc"));
            it.tmpfs = vec![bytes(b"/t\xfc:size=1m")];
        });
        let plan = Plan::new(&wishes, &image()).unwrap();
        let words = plan.process.arguments;
        assert_eq!(words, [&b"/entry"[..], b"--help", b"--", b"gr\xfcn"]);
        assert_eq!(plan.process.folder, b"/\xfc");
        assert_eq!(plan.setup.mounts[0].target, b"/t\xfc");
    }

    #[test]
    fn docker_s_wishes_become_the_guest_s() {
        let wishes = options(|it| {
            it.stop_signal = Some("INT".into());
            it.shm_size = Some("64m".into());
            it.ulimit = vec!["nofile=64:128".into()];
            it.add_host = ["db:192.0.2.7", "a=::1", "b:[::2]"]
                .map(str::to_owned)
                .to_vec();
            it.docker.security_opt = vec!["no-new-privileges".into()];
        });
        let plan = Plan::new(&wishes, &image()).unwrap();
        assert_eq!(plan.stop_signal, libc::SIGINT);
        assert!(plan.process.no_new_privileges);
        assert_eq!(plan.process.limits[0].hard, 128);
        let hosts = [("db", "192.0.2.7"), ("a", "::1"), ("b", "::2")];
        let hosts = hosts.map(|(name, ip)| (name.to_owned(), ip.parse().unwrap()));
        assert_eq!(plan.setup.hosts, hosts);
        assert_eq!(plan.setup.mounts[0].target, SHARED_MEMORY.as_bytes());
    }

    #[test]
    fn a_refusal_names_who_said_it() {
        let refused = |options: &Options, image: &RunConfig| {
            Plan::new(options, image).unwrap_err().to_string()
        };
        let of_image = |change: fn(&mut RunConfig)| {
            let mut image = image();
            change(&mut image);
            image
        };
        let given = options(|_| {});
        let told = refused(&given, &of_image(|it| it.hostname = "a\x1b b".into()));
        assert!(
            told.starts_with("the image's hostname a\\u{1b} b: "),
            "{told}"
        );
        let told = refused(&given, &of_image(|it| it.stop_signal = "X".into()));
        assert!(told.starts_with("the image's STOPSIGNAL X: "), "{told}");
        // As Docker has it.
        let plan = Plan::new(&given, &of_image(|it| it.working_dir = "srv".into()));
        assert_eq!(plan.unwrap().process.folder, b"/srv");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for change in [
            (|it: &mut Options| it.name = Some("a/b".into())) as fn(&mut Options),
            |it| it.hostname = Some("a b".into()),
            |it| it.folder = Some("srv".into()),
            |it| it.timeout = Some("0".into()),
            |it| it.timeout = Some("1d".into()),
            |it| it.timeout = Some(u64::MAX.to_string()),
            |it| it.sysctls = vec!["vm.swappiness".into()],
            |it| it.tmpfs = vec!["tmp".into()],
            |it| it.tmpfs = vec!["/tmp/../etc".into()],
            |it| it.tmpfs = vec!["/".into()],
            |it| it.tmpfs = vec!["/tmp:size=x".into()],
            |it| it.tmpfs = vec!["/tmp:suid".into()],
            |it| it.environment = vec!["=x".into()],
            |it| it.stop_signal = Some("WHAT".into()),
            |it| it.shm_size = Some("x".into()),
            |it| it.ulimit = vec!["nofile".into()],
            |it| it.add_host = vec!["db".into()],
            |it| it.add_host = vec!["a b:1.2.3.4".into()],
            |it| it.add_host = vec!["db:host-gateway".into()],
            |it| it.add_host = vec!["db:1.2.3".into()],
            |it| it.disk_size = Some("x".into()),
        ] {
            let options = options(change);
            assert!(Plan::new(&options, &image()).is_err(), "{options:?}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, expected) in [
            ("9", Some(9)),
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("RTMIN+3", Some(libc::SIGRTMIN() + 3)),
            ("SIGRTMIN+3", Some(libc::SIGRTMIN() + 3)),
            ("RTMIN", Some(libc::SIGRTMIN())),
            ("rtmin+30", Some(libc::SIGRTMAX())),
            ("SIGRTMAX", Some(libc::SIGRTMAX())),
            ("RTMAX-14", Some(libc::SIGRTMAX() - 14)),
            ("SIGPWR", Some(libc::SIGPWR)),
            ("IOT", Some(libc::SIGABRT)),
            ("RTMIN+31", None),
            ("RTMIN-1", None),
            ("RTMAX+1", None),
            ("RTMAX-31", None),
            ("RTMIN+", None),
            ("RTMIN+999999999999", None),
            ("0", None),
            ("65", None),
            ("-9", None),
            ("SIGWHAT", None),
        ] {
            assert_eq!(signal(text), expected, "{text}");
        }
    }
}
