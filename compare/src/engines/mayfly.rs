//! mayfly: `mayfly run`, as users run it.

use mayfly_protocol::peer::Meeting;

use super::commands::{first_line, words};
use super::engine::{About, Engine, Job, Place, VOLUME};
use crate::error::Error;
use crate::instance::{Launch, Sign};

pub struct Mayfly {
    version: String,
    flags: Vec<String>,
    network: &'static str,
    /// passt, as it calls itself.
    passt: Option<String>,
}

impl Mayfly {
    pub fn find(place: &Place) -> Result<Self, String> {
        let mayfly = place.mayfly;
        (mayfly.check_kvm)()?;
        Ok(Mayfly {
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

impl Engine for Mayfly {
    fn about(&self) -> About {
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
                "user" => Vec::new(),
                _ => vec!["without a network, as passt is not installed".into()],
            },
        }
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error> {
        let mut command = vec![place.program.clone().into_os_string()];
        let (cpus, memory) = (place.cpus.to_string(), format!("{}M", place.memory_mib));
        command.extend(words(["run", "--rm", "--json", "--name", &job.id]));
        command.extend(words([
            "--cpus",
            &cpus,
            "--memory",
            &memory,
            "--net",
            self.network,
        ]));
        command.extend(self.flags.iter().map(Into::into));
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
            env: vec![("XDG_DATA_HOME".into(), place.data.clone().into())],
            nonce: job.nonce.clone(),
            signs: vec![Sign::Record],
            ..Launch::default()
        })
    }
}
