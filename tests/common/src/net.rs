//! Networks of a test's own.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use crate::guest::{Guest, Running};
use crate::tools::tool;

/// The TAP of a namespace.
const TAP: &str = "tap0";

/// A network namespace with a TAP, gone with this.
pub struct Namespace {
    name: String,
    /// More keys of the guest's `--net`.
    keys: String,
}

impl Namespace {
    /// With a TAP of one queue.
    pub fn new(name: &str) -> Self {
        Self::with(name, "tap", "")
    }

    /// With a TAP of a mode, and more keys of `--net`.
    pub fn with(name: &str, mode: &str, keys: &str) -> Self {
        let mut namespace = Self::bare(name);
        namespace.keys = keys.into();
        for command in [
            &*format!("tuntap add dev tap0 mode {mode}"),
            "addr add 10.9.0.1/24 dev tap0",
            "link set tap0 up",
        ] {
            let words: Vec<&str> = command.split(' ').collect();
            tool("ip", &[&["-n", &namespace.name], &words[..]].concat());
        }
        namespace
    }

    /// With nothing but loopback.
    pub fn bare(name: &str) -> Self {
        let namespace = Namespace {
            name: format!("mayfly-{name}-{}", std::process::id()),
            keys: String::new(),
        };
        tool("ip", &["netns", "add", &namespace.name]);
        tool("ip", &["-n", &namespace.name, "link", "set", "lo", "up"]);
        namespace
    }

    /// What `ip netns` calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A program in the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// The guest is to be started in the namespace.
    pub fn enter(&self, mut guest: Guest) -> Guest {
        guest.command = self.inside(&guest.command);
        guest.command.stdin(Stdio::null());
        guest
    }

    /// The same command, in the namespace.
    pub fn inside(&self, command: &Command) -> Command {
        let mut inside = self.command(command.get_program());
        inside.args(command.get_args());
        for (name, value) in command.get_envs() {
            inside.env(name, value.unwrap_or_default());
        }
        inside
    }

    /// Starts the guest with the TAP and an address.
    pub fn start(&self, guest: Guest) -> Running {
        let guest = self.enter(guest);
        let address = "ip=10.9.0.2::10.9.0.1:255.255.255.0:guest:eth0:off";
        guest
            .args(["--net", &format!("tap={TAP}{}", self.keys)])
            .args(["--cmdline", address])
            .start()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
    }
}
