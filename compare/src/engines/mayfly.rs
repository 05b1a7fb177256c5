//! mayfly: `mayfly run`, as users run it, and as it boots.

use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_protocol::peer::Meeting;

use super::commands::{first_line, words};
use super::engine::{About, Engine, Job, PROBE, Place, VOLUME};
use crate::error::Error;
use crate::instance::{Launch, Sign};

/// How long the template may take that starts go on from.
const TEMPLATE_TIMEOUT: Duration = Duration::from_secs(300);
/// Between two looks whether it is there: each is a run.
const PAUSE: Duration = Duration::from_secs(1);

/// Whatever the user's environment says of all starts.
const COLD_AS_ASKED: (&str, &str) = ("MAYFLY_COLD", "0");

pub struct Mayfly {
    /// Each instance boots.
    cold: bool,
    version: String,
    flags: Vec<String>,
    network: &'static str,
    /// passt, as it calls itself.
    passt: Option<String>,
}

impl Mayfly {
    /// One whose instances boot, or start from a template, as is the rule.
    pub fn find(place: &Place, cold: bool) -> Result<Self, String> {
        let mayfly = place.mayfly;
        (mayfly.check_kvm)()?;
        Ok(Mayfly {
            cold,
            version: mayfly.version.clone(),
            flags: mayfly.flags.clone(),
            network: match mayfly.passt {
                Some(_) => "user",
                None => "none",
            },
            // Debian 12's does not know its own version.
            passt: (mayfly.passt.as_ref())
                .and_then(|passt| first_line(passt, &["--version"]))
                .filter(|said| !said.contains("unknown")),
        })
    }
}

impl Mayfly {
    /// A run of an instance of a name, up to its flags.
    fn run(&self, place: &Place, name: &str) -> Vec<OsString> {
        let mut command = vec![place.program.clone().into_os_string()];
        let (cpus, memory) = (place.cpus.to_string(), format!("{}M", place.memory_mib));
        command.extend(words(["run", "--rm", "--json", "--name", name]));
        command.extend(words(["--cpus", &cpus, "--memory", &memory]));
        command.extend(words(["--net", self.network]));
        if self.cold {
            command.extend(words(["--cold"]));
        }
        command.extend(self.flags.iter().map(Into::into));
        command
    }

    /// Whether a run started from a template.
    fn is_warm(&self, place: &Place) -> Result<bool, String> {
        let failed = |error: &dyn std::fmt::Display| format!("making its template: {error}");
        let mut words = self.run(place, "mayfly-compare-template").into_iter();
        let program = words.next().unwrap_or_default();
        let output = Command::new(program)
            .args(words)
            .args([place.image.as_str(), PROBE])
            .env("XDG_DATA_HOME", &place.data)
            .envs([COLD_AS_ASKED])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| failed(&error))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let record = said.lines().last().unwrap_or_default();
        let record: serde_json::Value =
            serde_json::from_str(record).map_err(|error| failed(&error))?;
        Ok(record["start"] == "warm")
    }
}

impl Engine for Mayfly {
    /// The first run would have the template made beside those that are measured.
    fn prepare(&mut self, place: &Place) -> Result<(), String> {
        if self.cold {
            return Ok(());
        }
        let deadline = Instant::now() + TEMPLATE_TIMEOUT;
        while !self.is_warm(place)? {
            if Instant::now() > deadline {
                return Err("its template does not come; see mayfly run --verbose".into());
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn about(&self) -> About {
        let start = match self.cold {
            true => "each instance boots",
            false => "each instance goes on from a template of the machine, as is the rule",
        };
        About {
            version: Some(self.version.clone()),
            network: match self.network {
                "user" => {
                    let passt = self.passt.as_deref().unwrap_or("passt");
                    format!("user network ({passt})")
                }
                _ => "none".into(),
            },
            notes: match self.network {
                "user" => vec![start.into()],
                _ => vec![
                    start.into(),
                    "without a network, as passt is not installed".into(),
                ],
            },
        }
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error> {
        let mut command = self.run(place, &job.id);
        // The peer is the host, which a guest does not reach by itself.
        let meetings = job.words.iter().filter_map(|word| word.parse().ok());
        for Meeting {
            port, addresses, ..
        } in meetings.filter(|_| self.network == "user")
        {
            let rules = addresses.iter().map(|it| format!("--allow={it}:{port}"));
            command.extend(rules.map(Into::into));
        }
        if let Some(volume) = &job.volume {
            command.extend(words(["-v", &format!("{}:{VOLUME}", volume.display())]));
        }
        command.push(place.image.clone().into());
        command.extend(job.command().into_iter().map(Into::into));
        Ok(Launch {
            command,
            env: vec![
                ("XDG_DATA_HOME".into(), place.data.clone().into()),
                (COLD_AS_ASKED.0.into(), COLD_AS_ASKED.1.into()),
            ],
            nonce: job.nonce.clone(),
            signs: vec![Sign::Record],
            ..Launch::default()
        })
    }
}
