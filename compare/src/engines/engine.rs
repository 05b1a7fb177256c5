//! What an engine is asked, and what it is given.

use std::ffi::OsString;
use std::path::PathBuf;

use rustix::process::Pid;

use crate::error::Error;
use crate::instance::Launch;
use crate::options::Mayfly;
use crate::peer::Origin;

/// Where the probe lies in all roots.
pub const PROBE: &str = "/.mayfly-probe";
/// Where an instance sees the volume, if it has one.
pub const VOLUME: &str = "/.mayfly-volume";

/// The files and options of a comparison, the same for all engines.
pub struct Place<'a> {
    /// The directory of a comparison's temporary files.
    pub directory: PathBuf,
    /// mayfly, in a file of its own.
    pub program: PathBuf,
    /// The image's files, with the probe. What runs in a container must not write there.
    pub root: PathBuf,
    /// The probe itself, which no image or container can have changed.
    pub probe: PathBuf,
    /// What mayfly knows as `XDG_DATA_HOME`, with the same files as an image.
    pub data: PathBuf,
    /// That image's name.
    pub image: String,
    /// The image's variables.
    pub env: Vec<String>,
    /// CPUs of an instance.
    pub cpus: u32,
    /// Memory of an instance, in MiB.
    pub memory_mib: u64,
    /// What mayfly tells of itself, and what VMs boot.
    pub mayfly: &'a Mayfly,
}

/// One launch.
#[derive(Debug)]
pub struct Job {
    /// What it is called, by nothing else on this host.
    pub id: String,
    /// What the probe's records begin with.
    pub nonce: String,
    /// The probe's arguments.
    pub words: Vec<String>,
    /// A directory of its own.
    pub directory: PathBuf,
    /// A directory of the host's that it is to have, too.
    pub volume: Option<PathBuf>,
}

impl Job {
    /// The command, for those that see the image's root.
    pub fn command(&self) -> Vec<String> {
        let words = [PROBE, self.nonce.as_str()].map(str::to_owned);
        words
            .into_iter()
            .chain(self.words.iter().cloned())
            .collect()
    }
}

/// What is to be known of an engine.
#[derive(Clone, Debug)]
pub struct About {
    /// As it says itself.
    pub version: Option<String>,
    /// The network that it gives.
    pub network: String,
    /// What one must know to read its figures.
    pub notes: Vec<String>,
}

/// One that can be compared.
pub trait Engine {
    /// Its version, its network, and notes for the report.
    fn about(&self) -> About;

    /// Makes what it keeps between instances. What removes that is known before.
    fn prepare(&mut self, _place: &Place) -> Result<(), String> {
        Ok(())
    }

    /// Prepares the launch of an instance.
    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error>;

    /// Asks less of the host, as what it was asked failed. False if there is nothing left.
    fn ask_less(&mut self) -> bool {
        false
    }

    /// It can give an instance a directory of the host.
    fn has_volumes(&self) -> bool {
        true
    }

    /// Where its instances' connections to the host come from.
    fn origin(&self) -> Origin {
        Origin::Host
    }

    /// Its processes are below ours.
    fn memory_is_ours(&self) -> bool {
        true
    }

    /// Processes that stay between instances. They are no part of any.
    fn residents(&self) -> Vec<Pid> {
        Vec::new()
    }

    /// What removes what it keeps between instances.
    fn undo(&self) -> Vec<Vec<OsString>> {
        Vec::new()
    }
}
