//! Flags of `docker run` that a VM has by itself, or means nothing by: taken where they
//! ask for what is so anyway, and refused, with the reason, where they ask for more.

use std::ffi::OsString;

use crate::failure::Failure;

/// What is taken for the sake of command lines that were written for Docker.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "For Docker's command lines")]
pub struct DockerFlags {
    /// Nothing: a VM's first process takes care of orphans anyway
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_name = "true|false", hide_possible_values = true)]
    pub init: Option<bool>,
    /// Nothing: a VM's root has all that its own kernel gives
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_name = "true|false", hide_possible_values = true)]
    pub privileged: Option<bool>,
    /// Nothing, as for --privileged (repeatable)
    #[arg(long, value_name = "CAPABILITY")]
    pub cap_add: Vec<OsString>,
    /// no-new-privileges; what turns a container's walls off means nothing (repeatable)
    #[arg(long, value_name = "OPTION")]
    pub security_opt: Vec<String>,
    /// Only no: there is no daemon that would start a VM again
    #[arg(long, value_name = "POLICY")]
    pub restart: Option<String>,
    /// Only linux/amd64
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// Only private: a VM shares nothing of this with the host
    #[arg(long, value_name = "MODE")]
    pub ipc: Option<String>,
    /// Only private, as for --ipc
    #[arg(long, value_name = "MODE")]
    pub pid: Option<String>,
    /// Only private, as for --ipc
    #[arg(long, value_name = "MODE")]
    pub uts: Option<String>,
    /// Only private, as for --ipc
    #[arg(long, value_name = "MODE")]
    pub userns: Option<String>,
    /// Only private, as for --ipc
    #[arg(long, value_name = "MODE")]
    pub cgroupns: Option<String>,
    /// Nothing: all ports of a VM can be published (repeatable)
    #[arg(long, value_name = "PORT")]
    pub expose: Vec<OsString>,
    /// Nothing: an image's health is not looked at
    #[arg(long)]
    pub no_healthcheck: bool,
}

impl DockerFlags {
    /// Refuses what a VM cannot be.
    pub fn check(&self) -> Result<(), Failure> {
        let refuse = |flag: &str, value: &str, why: &str| {
            Err(Failure::config(format!("--{flag} {value}: {why}")))
        };
        match self.restart.as_deref() {
            None | Some("no" | "") => {}
            Some(policy) => {
                let why = "there is no daemon that would start a VM again; have systemd do it, \
                           by Restart= of a unit";
                return refuse("restart", policy, why);
            }
        }
        match self.platform.as_deref() {
            None | Some("linux" | "linux/amd64" | "linux/x86_64" | "linux/amd64/v1") => {}
            Some(platform) => {
                return refuse("platform", platform, "VMs run linux/amd64 and nothing else");
            }
        }
        for (flag, mode) in [
            ("ipc", &self.ipc),
            ("pid", &self.pid),
            ("uts", &self.uts),
            ("userns", &self.userns),
            ("cgroupns", &self.cgroupns),
        ] {
            match mode.as_deref() {
                None | Some("" | "private") => {}
                Some("shareable") if flag == "ipc" => {}
                Some(mode) => {
                    let why = "a VM has a kernel of its own, and shares no namespace with the \
                               host or another VM";
                    return refuse(flag, mode, why);
                }
            }
        }
        self.no_new_privileges().map(drop)
    }

    /// Whether programs may give no privileges, as those with set-user-ID bits do.
    pub fn no_new_privileges(&self) -> Result<bool, Failure> {
        let mut wanted = false;
        for option in &self.security_opt {
            let (name, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
            match (name, value) {
                ("no-new-privileges", "" | "true") => wanted = true,
                ("no-new-privileges", "false") => wanted = false,
                // The walls of a container: a VM has others.
                ("seccomp" | "systempaths" | "apparmor", "unconfined") => {}
                ("apparmor", "docker-default") | ("label", "disable") => {}
                _ => {
                    return Err(Failure::config(format!(
                        "--security-opt {option}: a VM knows no-new-privileges, and no filters \
                         inside of it"
                    )));
                }
            }
        }
        Ok(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_so_anyway_is_taken_and_the_rest_is_refused_by_its_name() {
        let text = |it: &str| Some(it.to_owned());
        let all = DockerFlags {
            init: Some(true),
            privileged: Some(true),
            cap_add: vec!["ALL".into()],
            security_opt: [
                "seccomp=unconfined",
                "label=disable",
                "label:disable",
                "apparmor=unconfined",
                "apparmor=docker-default",
                "no-new-privileges",
            ]
            .map(str::to_owned)
            .to_vec(),
            restart: text("no"),
            platform: text("linux/amd64"),
            ipc: text("private"),
            pid: text(""),
            ..DockerFlags::default()
        };
        all.check().unwrap();
        assert!(all.no_new_privileges().unwrap());
        for (change, flag) in [
            (
                (|it: &mut DockerFlags| it.restart = Some("always".into())) as fn(&mut DockerFlags),
                "--restart always: ",
            ),
            (
                |it| it.platform = Some("linux/arm64".into()),
                "--platform linux/arm64: ",
            ),
            (|it| it.pid = Some("host".into()), "--pid host: "),
            (|it| it.uts = Some("shareable".into()), "--uts shareable: "),
            (
                |it| it.security_opt = vec!["seccomp=a.json".into()],
                "--security-opt seccomp=a.json: ",
            ),
            (
                |it| it.security_opt = vec!["apparmor=mine".into()],
                "--security-opt apparmor=mine: ",
            ),
            (
                |it| it.security_opt = vec!["label=type:mine_t".into()],
                "--security-opt label=type:mine_t: ",
            ),
        ] {
            let mut flags = DockerFlags::default();
            change(&mut flags);
            let refused = flags.check().unwrap_err().to_string();
            assert!(refused.starts_with(flag), "{refused}");
        }
    }
}
