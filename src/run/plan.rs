//! From an image and the user's wishes to a machine, its setup and its process.

use std::collections::HashSet;
use std::env;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use mayfly_guest::protocol::{Mount, Process, Setup, Source};

use super::log;
use super::options::Options;
use crate::config::parse_size;
use crate::failure::{Failure, OrFail};
use crate::image::RunConfig;

/// What an image's command is looked for in, where the image does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
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
        let hostname = match (&options.hostname, image.hostname.as_str()) {
            (Some(name), _) => name.clone(),
            (None, "") => name.chars().take(HOSTNAME_MAX).collect(),
            (None, name) => name.to_owned(),
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        if hostname.is_empty() || hostname.len() > HOSTNAME_MAX || !hostname.bytes().all(plain) {
            return Err(Failure::config(format!(
                "--hostname {hostname}: write 1 to {HOSTNAME_MAX} letters, digits, and . - _"
            )));
        }
        let mut mounts = Vec::new();
        for text in &options.tmpfs {
            mounts.push(tmpfs(text)?);
        }
        let folder = options.folder.as_ref().unwrap_or(&image.working_dir);
        if !folder.is_empty() && !folder.starts_with('/') {
            return Err(Failure::config(format!(
                "--workdir {folder}: must begin with a slash"
            )));
        }
        let stop_signal = match image.stop_signal.as_str() {
            "" => SIGTERM,
            text => signal(text).ok_or_else(|| {
                Failure::config(format!("the image's STOPSIGNAL {text} is no signal"))
            })?,
        };
        let size = |text: &String| {
            let size = parse_size(text, MIB);
            size.map_err(|error| Failure::config(format!("--disk-size {text}: {error}")))
        };
        Ok(Plan {
            setup: Setup {
                read_only: options.read_only,
                hostname: hostname.clone(),
                mounts,
                folder: folder.clone().into_bytes(),
                ..Setup::default()
            },
            process: Process {
                arguments: arguments(options, image)?,
                environment: environment(options, image, &hostname)?,
                folder: folder.clone().into_bytes(),
                user: options.user.as_ref().unwrap_or(&image.user).clone(),
                terminal: None,
                input: options.interactive,
            },
            name,
            stop_signal,
            timeout: options.timeout.as_deref().map(time).transpose()?,
            disk_size: options.disk_size.as_ref().map(size).transpose()?,
            log_size: match &options.log_size {
                Some(text) => log_size(text)?,
                None => log::SIZE,
            },
        })
    }
}

/// Entrypoint and command, as Docker has them: another entrypoint takes the
/// image's command with it.
fn arguments(options: &Options, image: &RunConfig) -> Result<Vec<Vec<u8>>, Failure> {
    let (entrypoint, command): (&[String], &[String]) = match &options.entrypoint {
        Some(program) if program.is_empty() => (&[], &options.command),
        Some(program) => (std::slice::from_ref(program), &options.command),
        None if options.command.is_empty() => (&image.entrypoint, &image.cmd),
        None => (&image.entrypoint, &options.command),
    };
    let all: Vec<_> = entrypoint.iter().chain(command).cloned().collect();
    match all.is_empty() {
        true => Err(Failure::config(format!(
            "{}: the image names no command; give one",
            options.image
        ))),
        false => Ok(all.into_iter().map(String::into_bytes).collect()),
    }
}

/// Names and values.
pub type Variables = Vec<(Vec<u8>, Vec<u8>)>;

/// The image's variables, then files', then flags'; the last one of a name wins.
fn environment(options: &Options, image: &RunConfig, hostname: &str) -> Result<Variables, Failure> {
    let mut all: Variables = vec![(b"PATH".into(), PATH.into())];
    all.push((b"HOSTNAME".into(), hostname.into()));
    if options.terminal {
        let terminal = env::var_os("TERM").unwrap_or_else(|| "xterm".into());
        all.push((b"TERM".into(), terminal.into_vec()));
    }
    all.extend(variables(&image.env, "the image's ENV")?);
    for path in &options.environment_files {
        let flag = format!("--env-file {}", path.display());
        let text = fs::read_to_string(path).or_config(&flag)?;
        let lines = text.lines().map(str::trim_start);
        let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        let lines: Vec<String> = lines.map(str::to_owned).collect();
        all.extend(variables(&lines, &flag)?);
    }
    all.extend(variables(&options.environment, "--env")?);
    let mut seen = HashSet::new();
    let mut last: Variables = all.into_iter().rev().collect();
    last.retain(|(name, _)| seen.insert(name.clone()));
    last.reverse();
    Ok(last)
}

/// `NAME=VALUE`, or `NAME` for the host's own value, if it has one.
pub fn variables(texts: &[String], flag: &str) -> Result<Variables, Failure> {
    let mut all = Variables::new();
    for text in texts {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.as_bytes().to_vec())),
            None => (text.as_str(), env::var_os(text).map(OsStringExt::into_vec)),
        };
        if name.is_empty() || text.contains('\0') {
            return Err(Failure::config(format!("{flag} {text}: has no name")));
        }
        all.extend(value.map(|value| (name.into(), value)));
    }
    Ok(all)
}

fn tmpfs(text: &str) -> Result<Mount, Failure> {
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    let failed = |reason: &str| Failure::config(format!("--tmpfs {text}: {reason}"));
    if !target.starts_with('/') {
        return Err(failed("the folder must begin with a slash"));
    }
    let mut data = vec!["mode=1777".to_owned()];
    let (mut read_only, mut no_exec) = (false, false);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("size", size)) => {
                let size = parse_size(size, 0).map_err(|error| failed(&error))?;
                data.push(format!("size={size}"));
            }
            Some(("mode", mode)) if u32::from_str_radix(mode, 8).is_ok() => {
                data.push(option.to_owned());
            }
            Some(("uid" | "gid", number)) if number.parse::<u32>().is_ok() => {
                data.push(option.to_owned());
            }
            None if option == "ro" => read_only = true,
            None if option == "noexec" => no_exec = true,
            // As it is anyway.
            None if ["rw", "exec", "nosuid", "nodev"].contains(&option) => {}
            _ => {
                return Err(failed(
                    "write size=64M, mode=1777, uid=0, gid=0, ro, noexec, nosuid, nodev",
                ));
            }
        }
    }
    Ok(Mount {
        target: target.into(),
        source: Source::Tmpfs {
            options: data.join(","),
            no_exec,
        },
        read_only,
    })
}

/// A signal, by its number or its name with or without `SIG`.
pub fn signal(text: &str) -> Option<i32> {
    const NAMES: [(&str, i32); 22] = [
        ("HUP", libc::SIGHUP),
        ("INT", libc::SIGINT),
        ("QUIT", libc::SIGQUIT),
        ("ILL", libc::SIGILL),
        ("TRAP", libc::SIGTRAP),
        ("ABRT", libc::SIGABRT),
        ("BUS", libc::SIGBUS),
        ("FPE", libc::SIGFPE),
        ("KILL", libc::SIGKILL),
        ("USR1", libc::SIGUSR1),
        ("SEGV", libc::SIGSEGV),
        ("USR2", libc::SIGUSR2),
        ("PIPE", libc::SIGPIPE),
        ("ALRM", libc::SIGALRM),
        ("TERM", libc::SIGTERM),
        ("CHLD", libc::SIGCHLD),
        ("CONT", libc::SIGCONT),
        ("STOP", libc::SIGSTOP),
        ("TSTP", libc::SIGTSTP),
        ("TTIN", libc::SIGTTIN),
        ("TTOU", libc::SIGTTOU),
        ("WINCH", libc::SIGWINCH),
    ];
    const MAX: i32 = 64;
    if let Ok(number) = text.parse() {
        return (1..=MAX).contains(&number).then_some(number);
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Some(number) = name.strip_prefix("RTMIN+") {
        let number = number.parse::<i32>().ok()?.checked_add(libc::SIGRTMIN())?;
        return (..=libc::SIGRTMAX()).contains(&number).then_some(number);
    }
    NAMES.iter().find(|(it, _)| *it == name).map(|&(_, it)| it)
}

/// A hundred years.
const TIMEOUT_MAX: u64 = 100 * 366 * 24 * 3600;

/// A time: seconds, or with a unit.
fn time(text: &str) -> Result<Duration, Failure> {
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
            it.entrypoint = Some(String::new());
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
    fn what_makes_no_sense_is_refused() {
        for change in [
            (|it: &mut Options| it.name = Some("a/b".into())) as fn(&mut Options),
            |it| it.hostname = Some("a b".into()),
            |it| it.folder = Some("srv".into()),
            |it| it.timeout = Some("0".into()),
            |it| it.timeout = Some("1d".into()),
            |it| it.timeout = Some(u64::MAX.to_string()),
            |it| it.tmpfs = vec!["tmp".into()],
            |it| it.tmpfs = vec!["/tmp:size=x".into()],
            |it| it.tmpfs = vec!["/tmp:suid".into()],
            |it| it.environment = vec!["=x".into()],
            |it| it.environment_files = vec!["/nowhere".into()],
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
            ("0", None),
            ("65", None),
            ("-9", None),
            ("SIGWHAT", None),
        ] {
            assert_eq!(signal(text), expected, "{text}");
        }
    }
}
