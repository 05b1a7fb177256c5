//! How a machine starts: from a template, if there is one that fits, or by booting.

use std::fs::File;
use std::io::{self, Seek, Write};

use kvm_ioctls::Kvm;
use mayfly_protocol::agent::{HostMessage, send};
use mayfly_protocol::mailbox::Mail;
use rustix::fs::{MemfdFlags, memfd_create};

use super::options::Options;
use super::plan::Plan;
use super::session::SessionEnd;
use super::template::{self, Wish};
use crate::config::{MachineConfig, Network};
use crate::failure::{Failure, OrFail};
use crate::link::Origin;
use crate::snapshot::store::{Host, Template, TemplateKey, Templates};
use crate::supervisor::SnapshotFiles;

/// A message that fits into an agent's mailbox for certain: more goes over the connection.
const MAIL_MAX: usize = 120 << 10;

/// How a machine starts.
pub enum Start {
    /// From a template.
    Warm(Box<Template>),
    /// By booting.
    Cold {
        /// Why.
        why: String,
        /// The template that would have been taken, if one is to be made.
        wish: Option<Box<Wish>>,
    },
}

impl Start {
    /// Looks for a template.
    pub fn choose(options: &Options, config: &MachineConfig) -> Self {
        let cold = |why: &str| Start::Cold {
            why: why.to_owned(),
            wish: None,
        };
        if options.cold {
            return cold("--cold is given");
        }
        if let Some(why) = config.spec.why_not_saved() {
            return cold(why);
        }
        let is_tap = |network: &Network| matches!(network, Network::Tap { .. });
        if config
            .nets
            .iter()
            .any(|net| is_tap(&net.config.config.network))
        {
            return cold("its network is a TAP device");
        }
        let found = key(config).and_then(|key| Ok((Templates::open_default()?.find(&key), key)));
        match found {
            Ok((Ok(template), _)) => Start::Warm(Box::new(template)),
            Ok((Err(miss), key)) => Start::Cold {
                why: miss.to_string(),
                wish: Some(Box::new(Wish::of(config, key))),
            },
            Err(failure) => cold(&failure.to_string()),
        }
    }

    /// The files that the machine goes on from, and whether its guest gets its first frames
    /// with them.
    pub fn files(&self, plan: &Plan) -> Result<(SnapshotFiles, bool), Failure> {
        const WHAT: &str = "the message for the guest";
        let Start::Warm(template) = self else {
            return Ok((SnapshotFiles::None, false));
        };
        let mut mail = Mail {
            frames: frames(plan).or_internal(WHAT)?,
            ..Mail::default()
        };
        let has_frames = mail.frames.len() <= MAIL_MAX;
        if !has_frames {
            mail.frames = Vec::new();
        }
        let files = SnapshotFiles::Restore {
            state: template.state.try_clone().or_host(WHAT)?,
            memory: template.memory.try_clone().or_host(WHAT)?,
            mail: in_memory(&mail.to_bytes().or_internal(WHAT)?).or_host(WHAT)?,
        };
        Ok((files, has_frames))
    }

    /// Takes note of where the machine really begins.
    pub fn settle(self, origin: &Origin) -> Self {
        let (template, why) = match (self, origin) {
            (Start::Warm(template), Origin::NotRestored(why)) => (template, why),
            (start, _) => return start,
        };
        let why = format!("its template could not be restored: {why}");
        set_aside(*template, &why);
        Start::Cold { why, wish: None }
    }

    /// Whether the machine's agent came from a template and ended without an answer: nobody has
    /// seen anything of it.
    pub fn has_failed(&self, answered: bool, end: &SessionEnd) -> bool {
        matches!((self, end), (Start::Warm(_), SessionEnd::Silent)) && !answered
    }

    /// Takes a template that failed out of use.
    pub fn discard(self) {
        if let Start::Warm(template) = self {
            set_aside(
                *template,
                "the agent of a machine from its template did not answer",
            );
        }
    }

    /// Why the machine boots, if it does.
    pub fn why_cold(&self) -> Option<&str> {
        match self {
            Start::Warm(_) => None,
            Start::Cold { why, .. } => Some(why),
        }
    }

    /// Has the template made that was missed, by a process of its own. Nobody waits for it.
    pub fn make_missing(&self) {
        if let Start::Cold {
            wish: Some(wish), ..
        } = self
            && let Err(failure) = template::make_in_background(wish)
        {
            log::warn!("making a template: {failure}");
        }
    }
}

/// Takes a template out of use that failed.
fn set_aside(template: Template, why: &str) {
    log::warn!("{why}; it boots instead");
    let set_aside = Templates::open_default().and_then(|all| all.set_aside(template, why));
    if let Err(failure) = set_aside {
        log::warn!("setting a template aside: {failure}");
    }
}

/// The key of the template for a machine on this host.
fn key(config: &MachineConfig) -> Result<TemplateKey, Failure> {
    let templates = Templates::open_default()?;
    let mut digests = templates.digests();
    let kernel = digests.of(&config.guest.kernel)?;
    let initrd = config.guest.initrd.as_deref();
    let initrd = initrd.ok_or_else(|| Failure::config("it has no initial RAM disk"))?;
    let agent = digests.of(initrd)?;
    templates.keep_digests(&digests)?;
    let host = Host::this(&Kvm::new().or_host("/dev/kvm")?)?;
    TemplateKey::new(config.spec.shape(), kernel, agent, host)
}

/// What the host says to an agent first.
fn frames(plan: &Plan) -> io::Result<Vec<u8>> {
    let mut frames = Vec::new();
    send(
        &mut frames,
        &HostMessage::Setup(Box::new(plan.setup.clone())),
    )?;
    send(
        &mut frames,
        &HostMessage::Start(Box::new(plan.process.clone())),
    )?;
    Ok(frames)
}

/// A file of bytes that no file system has.
fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("mail", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}
