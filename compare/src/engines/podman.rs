//! `podman run`, on the unpacked root with an overlay.
//!
//! What Podman keeps is kept apart from what the user's own Podman has, so that all of it can
//! be removed: its storage, its networks and, for an ordinary user, the process that holds
//! the user namespace of all containers (the pause process).

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Pid, geteuid};
use serde_json::Value;

use super::commands::{program, words};
use super::engine::{About, Engine, Job, Place, VOLUME};
use crate::error::Error;
use crate::instance::{Launch, Sign};
use crate::model::Mark;
use crate::peer::Origin;
use crate::undo::ask;

/// What it leaves on the host, and takes again if it is there; inner directories come first.
const SHARED: [&str; 9] = [
    "/run/crun",
    "/run/runc",
    "/run/netns",
    "/sys/fs/cgroup/libpod_parent/conmon",
    "/sys/fs/cgroup/libpod_parent",
    "/sys/fs/cgroup/podman_probe",
    "/var/lib/cni/networks",
    "/var/lib/cni/results",
    "/var/lib/cni",
];
const NETNS: &str = "/run/netns";
const CNI: &str = "/var/lib/cni/networks";

/// The chains that its networks' firewall leaves: a name that shows whether they were there
/// before, and for each table what removes them. That is done at once or, as they are in use
/// by others, not at all.
const CHAINS: [(&str, &str); 3] = [
    (
        "CNI-FORWARD",
        r#"*filter
-D FORWARD -m comment --comment "CNI firewall plugin rules" -j CNI-FORWARD
-D CNI-FORWARD -m comment --comment "CNI firewall plugin admin overrides" -j CNI-ADMIN
-X CNI-FORWARD
-X CNI-ADMIN
COMMIT
"#,
    ),
    (
        "NETAVARK_FORWARD",
        r#"*filter
-D FORWARD -m comment --comment "netavark firewall plugin rules" -j NETAVARK_FORWARD
-X NETAVARK_FORWARD
COMMIT
"#,
    ),
    (
        "NETAVARK-HOSTPORT-DNAT",
        r#"*nat
-D PREROUTING -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-D OUTPUT -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-D POSTROUTING -j NETAVARK-HOSTPORT-MASQ
-D NETAVARK-HOSTPORT-MASQ -m comment --comment "netavark portfw masq mark" -m mark --mark 0x2000/0x2000 -j MASQUERADE
-D NETAVARK-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000
-X NETAVARK-HOSTPORT-DNAT
-X NETAVARK-HOSTPORT-MASQ
-X NETAVARK-HOSTPORT-SETMARK
COMMIT
"#,
    ),
];

/// The features that it asks of the host.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Wants {
    network: bool,
    limits: bool,
}

pub struct Podman {
    program: PathBuf,
    version: Option<String>,
    root: bool,
    /// Its manager of cgroups, where the one that it takes by itself is not there.
    manager: Option<&'static str>,
    /// What it keeps, for this comparison alone.
    directory: PathBuf,
    /// Its network's name, as root.
    network: String,
    /// The backend of its networks.
    backend: String,
    wants: Wants,
    /// The features to ask for if those fail, in order.
    less: VecDeque<Wants>,
    /// Holds a user's namespace.
    pause: Option<Pid>,
    /// What of [`SHARED`] was not there before.
    new: Vec<&'static str>,
    /// The same of [`CHAINS`].
    chains: Vec<(PathBuf, &'static str)>,
}

impl Podman {
    pub fn find(place: &Place) -> Result<Self, String> {
        let program = program("podman")?;
        let root = geteuid().is_root();
        let systemd = Path::new("/run/systemd/system").exists();
        let directory = place.directory.join("podman");
        let mut chains = Vec::new();
        if root && let Ok(rules) = ask(&mut Command::new("iptables-save")) {
            let missing = CHAINS.iter().filter(|(name, _)| !rules.contains(name));
            chains.extend(missing.map(|&(name, text)| (directory.join(name), text)));
        }
        let mut new = SHARED.to_vec();
        new.retain(|path| root && !Path::new(path).exists());
        let name = place.directory.file_name().unwrap_or_default();
        Ok(Podman {
            version: None,
            program,
            root,
            manager: (!systemd).then_some("cgroupfs"),
            directory,
            network: name.to_string_lossy().into_owned(),
            backend: String::new(),
            wants: Wants {
                network: true,
                limits: true,
            },
            less: VecDeque::new(),
            pause: None,
            new,
            chains,
        })
    }

    fn begin(&self) -> Vec<OsString> {
        let mut command = vec![self.program.clone().into_os_string()];
        let directory = self.directory.to_string_lossy();
        command.extend(words(["--root", &format!("{directory}/root")]));
        command.extend(words(["--runroot", &format!("{directory}/run")]));
        command.extend(words(["--network-config-dir", &format!("{directory}/net")]));
        if self.root {
            // A user's is below XDG_RUNTIME_DIR.
            command.extend(words(["--tmpdir", &format!("{directory}/tmp")]));
        }
        if let Some(manager) = self.manager {
            command.extend(words(["--cgroup-manager", manager]));
        }
        command
    }

    /// A user's has the pause process's number there.
    fn env(&self) -> Vec<(String, OsString)> {
        const RUN: &str = "XDG_RUNTIME_DIR";
        const BUS: &str = "DBUS_SESSION_BUS_ADDRESS";
        if self.root {
            return Vec::new();
        }
        let mut env = vec![(RUN.into(), self.directory.join("user").into_os_string())];
        // It asks systemd for control groups, whose socket is in the user's own.
        let bus = std::env::var_os(RUN).map(|run| Path::new(&run).join("bus"));
        if let Some(bus) = bus.filter(|bus| bus.exists() && std::env::var_os(BUS).is_none()) {
            env.push((BUS.into(), format!("unix:path={}", bus.display()).into()));
        }
        env
    }

    /// A command line that has what it needs of the environment.
    fn apart(&self, rest: &[&str]) -> Vec<OsString> {
        let mut command = Vec::new();
        if !self.root {
            command.push("env".into());
            command.extend(self.env().into_iter().map(|(name, value)| {
                let mut word = OsString::from(name + "=");
                word.push(value);
                word
            }));
        }
        command.extend(self.begin());
        command.extend(rest.iter().map(OsString::from));
        command
    }

    fn ask(&self, rest: &[&str]) -> Result<String, String> {
        let line = self.begin();
        let mut command = Command::new(&self.program);
        command.args(line.iter().skip(1)).args(rest);
        ask(command.envs(self.env()))
    }
}

impl Engine for Podman {
    fn about(&self) -> About {
        let mut notes = Vec::new();
        if !self.root {
            notes.push(
                "XDG_RUNTIME_DIR is the comparison's own, so that its pause process is; that is not part of any instance"
                    .into(),
            );
        }
        if !self.wants.network {
            notes.push("without a network, as its own failed on this host".into());
        }
        if !self.wants.limits {
            notes.push("without a cgroup, as this host does not let it have one".into());
        }
        About {
            version: self.version.clone(),
            network: match (self.wants.network, self.root) {
                (true, true) => format!("a bridge as its default one ({})", self.backend),
                (true, false) => format!("its default ({})", self.backend),
                (false, _) => "none".into(),
            },
            notes,
        }
    }

    fn prepare(&mut self, _place: &Place) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("{}: {error}", self.directory.display());
        for directory in ["tmp", "net", "user"] {
            fs::create_dir_all(self.directory.join(directory)).map_err(failed)?;
        }
        for (path, text) in &self.chains {
            fs::write(path, text).map_err(failed)?;
        }
        // A user's first call leaves the pause process.
        let info = self.ask(&["info", "--format", "json"])?;
        let info: Value = serde_json::from_str(&info).unwrap_or_default();
        let said = |value: &Value| {
            value
                .as_str()
                .filter(|it| !it.is_empty())
                .map(str::to_owned)
        };
        self.version = said(&info["version"]["Version"]).map(|it| format!("podman version {it}"));
        let host = &info["host"];
        self.backend = match self.root {
            // Before Podman 4 there was but one of each.
            true => said(&host["networkBackend"]).unwrap_or_else(|| "cni".into()),
            false => said(&host["rootlessNetworkCmd"]).unwrap_or_else(|| "slirp4netns".into()),
        };
        if self.root {
            let create = ["network", "create", "--disable-dns", &self.network];
            self.wants.network = self.ask(&create).is_ok();
        } else {
            // Only systemd gives a user control groups; else limits are silently ignored.
            self.wants.limits = host["cgroupManager"] == "systemd";
            let path = self.directory.join("user/libpod/tmp/pause.pid");
            let pid = fs::read_to_string(path).ok();
            self.pause = pid.and_then(|pid| Pid::from_raw(pid.trim().parse().ok()?));
        }
        let all = [(true, false), (false, true), (false, false)];
        let less = all.map(|(network, limits)| Wants { network, limits });
        let most = self.wants;
        self.less.extend(less.into_iter().filter(|less| {
            *less != most && less.network <= most.network && less.limits <= most.limits
        }));
        Ok(())
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error> {
        let mut command = self.begin();
        let pidfile = job.directory.join("pid");
        command.extend(words(["run", "--rm", "--name", &job.id]));
        command.extend(words(["--pidfile", &pidfile.to_string_lossy()]));
        match self.wants.limits {
            true => command.extend(words([
                "--cpus",
                &place.cpus.to_string(),
                "--memory",
                &format!("{}m", place.memory_mib),
            ])),
            false => command.extend(words(["--cgroups", "disabled"])),
        }
        match (self.wants.network, self.root) {
            (true, true) => command.extend(words(["--network", &self.network])),
            (true, false) => {}
            (false, _) => command.extend(words(["--network", "none"])),
        }
        for variable in &place.env {
            command.extend(words(["--env", variable]));
        }
        if let Some(volume) = &job.volume {
            command.extend(words(["-v", &format!("{}:{VOLUME}", volume.display())]));
        }
        command.extend(words(["--rootfs", &format!("{}:O", place.root.display())]));
        command.extend(job.command().into_iter().map(Into::into));
        Ok(Launch {
            command,
            env: self.env(),
            nonce: job.nonce.clone(),
            signs: vec![Sign::File(pidfile, Mark::Built)],
            stop: Some(self.apart(&["kill", "--signal", "TERM", &job.id])),
            undo: vec![self.apart(&["rm", "--force", "--time", "0", &job.id])],
            ..Launch::default()
        })
    }

    /// An ordinary user's network is a process of the host, root's a bridge.
    fn origin(&self) -> Origin {
        match self.root {
            true => Origin::Anywhere,
            false => Origin::Host,
        }
    }

    fn ask_less(&mut self) -> bool {
        let less = self.less.pop_front();
        less.inspect(|less| self.wants = *less).is_some()
    }

    fn residents(&self) -> Vec<Pid> {
        self.pause.into_iter().collect()
    }

    fn undo(&self) -> Vec<Vec<OsString>> {
        if !self.root {
            // Ends the pause process, whose number is in a file of our own.
            return vec![self.apart(&["system", "migrate"])];
        }
        let mut undo = vec![self.apart(&["network", "rm", "--force", &self.network])];
        let addresses = format!("{CNI}/{}", self.network);
        undo.push(words(["rm", "-rf", "--", &addresses]));
        for (path, _) in &self.chains {
            let path = path.to_string_lossy();
            undo.push(words(["iptables-restore", "--noflush", &path]));
        }
        if self.new.contains(&NETNS) {
            // It is busy if others have theirs there.
            undo.push(words(["umount", NETNS]));
        }
        // What others use is not empty.
        let directories = self.new.iter().map(OsString::from);
        undo.push(
            words(["rmdir", "--"])
                .into_iter()
                .chain(directories)
                .collect(),
        );
        undo
    }
}
