//! mayfly: `mayfly run`, as users run it.

use mayfly_protocol::peer::Meeting;

use super::{About, Engine, Job, Place, VOLUME, first_line, words};
use crate::compare::instance::{Launch, Sign};
use crate::failure::Failure;
use crate::net::passt;

pub struct Mayfly {
    network: &'static str,
    /// passt, as it calls itself.
    passt: Option<String>,
}

impl Mayfly {
    pub fn find(place: &Place) -> Result<Self, String> {
        crate::machine::open_kvm(place.accept_kvm).map_err(|failure| failure.to_string())?;
        Ok(Mayfly {
            network: match passt::program() {
                Some(_) => "user",
                None => "none",
            },
            // Debian 12's does not know its own version.
            passt: passt::program()
                .and_then(|passt| first_line(&passt, &["--version"]))
                .filter(|said| !said.contains("unknown")),
        })
    }
}

impl Engine for Mayfly {
    fn about(&self) -> About {
        About {
            version: Some(env!("CARGO_PKG_VERSION").into()),
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

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Failure> {
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
        if place.accept_kvm.accept_kvm {
            command.push("--accept-kvm".into());
        }
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
