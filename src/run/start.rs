//! How a machine starts: from a template, if there is one that fits, or by booting.

use std::fs::File;
use std::io::{self, Seek, Write};

use mayfly_protocol::agent::{HostMessage, send};
use mayfly_protocol::mailbox::Mail;
use rustix::fs::{MemfdFlags, memfd_create};

use super::options::Options;
use super::plan::Plan;
use super::session::{Answer, SessionEnd};
use super::template::{self, TemplateRequest};
use crate::config::{MachineConfig, Network};
use crate::failure::{Class, Failure, OrFail};
use crate::link::{Ending, Origin, Outcome};
use crate::snapshot::store::{Template, TemplateKey, Templates};
use crate::supervisor::{SnapshotFiles, was_killed};

/// A message that fits into an agent's mailbox for certain: more goes over the connection.
const MAIL_MAX: usize = 120 << 10;

/// How a machine starts.
pub enum Start {
    /// From a template.
    Warm(Box<Template>),
    /// By booting.
    Cold {
        /// The reason that it boots.
        why: String,
        /// The template that would have been taken, if one is to be made.
        request: Option<Box<TemplateRequest>>,
    },
}

impl Start {
    /// Looks for a template.
    pub fn choose(options: &Options, config: &MachineConfig) -> Self {
        let cold = |why: &str| Start::Cold {
            why: why.to_owned(),
            request: None,
        };
        if options.cold {
            let why = options.cold_because.as_deref();
            return cold(why.unwrap_or("--cold is given"));
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
        let found =
            template::key(config).and_then(|key| Ok((Templates::open_default()?.find(&key), key)));
        match found {
            Ok((Ok(template), _)) => Start::Warm(Box::new(template)),
            Ok((Err(miss), key)) => Start::Cold {
                why: miss.to_string(),
                request: may_make(&key).then(|| Box::new(TemplateRequest::of(config, key))),
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

    /// Takes note of where the machine really begins. A template that does not fit is not taken
    /// again; one that this host has no room for at present may be.
    pub fn settle(self, origin: &Origin) -> Self {
        let (template, why, unfit) = match (self, origin) {
            (Start::Warm(template), Origin::NotRestored { why, unfit }) => (template, why, *unfit),
            (start, _) => return start,
        };
        let why = format!("its template could not be restored: {why}");
        log::warn!("{why}; it boots instead");
        if unfit {
            set_aside(*template, &why);
        }
        Start::Cold { why, request: None }
    }

    /// Why the machine is to be booted after all, if it came from a template and ended before
    /// its command could start.
    pub fn why_again(
        &self,
        answer: Answer,
        session: &SessionEnd,
        ending: &Result<Ending, Failure>,
    ) -> Option<Fault> {
        match self {
            Start::Warm(_) => fault(answer, session, ending),
            Start::Cold { .. } => None,
        }
    }

    /// Takes note that the machine did not even start.
    pub fn why_not_started(&self, failure: &Failure) -> Option<Fault> {
        match self {
            Start::Warm(_) => why_not_started(failure),
            Start::Cold { .. } => None,
        }
    }

    /// Has the machine booted instead: the result is why.
    pub fn discard(self, fault: Fault) -> String {
        match (self, fault) {
            (Start::Warm(template), Fault::OfTemplate(why)) => {
                log::warn!("{why}; it boots instead");
                set_aside(*template, &why);
                why
            }
            (_, Fault::OfTemplate(why) | Fault::Other(why)) => {
                log::warn!("{why}; it boots instead");
                why
            }
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
            request: Some(request),
            ..
        } = self
            && let Err(failure) = template::make_in_background(request)
        {
            log::warn!("making a template: {failure}");
        }
    }
}

/// Whether the template of a key is to be made, if it is missing.
fn may_make(key: &TemplateKey) -> bool {
    Templates::open_default().is_ok_and(|templates| templates.may_make(key))
}

/// What came of a start from a template.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// The template is of no use.
    OfTemplate(String),
    /// It may be good; booting may go better all the same.
    Other(String),
}

/// What the end of a machine from a template says of that. Who ended it on purpose wants no
/// other.
fn fault(answer: Answer, session: &SessionEnd, ending: &Result<Ending, Failure>) -> Option<Fault> {
    let of_template = |why: String| Some(Fault::OfTemplate(why));
    match (session, answer) {
        (SessionEnd::Signalled(_) | SessionEnd::TimedOut(_), _) | (_, Answer::SetUp) => {
            return None;
        }
        (_, Answer::Late) => {
            return of_template("the agent of a machine from its template is silent".into());
        }
        (_, Answer::Refused) => {
            let why = "its setup failed in a machine from a template";
            return Some(Fault::Other(why.into()));
        }
        (_, Answer::None) => {}
    }
    match ending {
        Ok(ending) => match &ending.outcome {
            Outcome::Forced | Outcome::Quit | Outcome::Signal(_) | Outcome::Saved => None,
            Outcome::Internal(why) if was_killed(why) => None,
            outcome => of_template(format!("a machine from its template ended: {outcome}")),
        },
        Err(failure) => why_not_started(failure),
    }
}

/// What a failure says of the template that a machine was to start from.
fn why_not_started(failure: &Failure) -> Option<Fault> {
    let why = || format!("its template could not be used: {failure}");
    match failure.class {
        _ if failure.signal().is_some() => None,
        Class::Internal => Some(Fault::OfTemplate(why())),
        Class::Host => Some(Fault::Other(why())),
        _ => None,
    }
}

/// Takes a template out of use that failed.
fn set_aside(template: Template, why: &str) {
    let set_aside = Templates::open_default().and_then(|all| all.set_aside(template, why));
    if let Err(failure) = set_aside {
        log::warn!("setting a template aside: {failure}");
    }
}

/// What the host says to an agent first. The command comes when that is done: a machine that
/// fails before can be booted instead.
fn frames(plan: &Plan) -> io::Result<Vec<u8>> {
    let mut frames = Vec::new();
    send(
        &mut frames,
        &HostMessage::Setup(Box::new(plan.setup.clone())),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timing::Timeline;

    fn ended(outcome: Outcome) -> Result<Ending, Failure> {
        Ok(Ending {
            outcome,
            guest_status: None,
            last_lines: Vec::new(),
            timeline: Timeline::start(),
        })
    }

    fn is_of_template(answer: Answer, ending: &Result<Ending, Failure>) -> Option<bool> {
        let fault = fault(answer, &SessionEnd::Silent, ending)?;
        Some(matches!(fault, Fault::OfTemplate(_)))
    }

    #[test]
    fn what_ends_before_its_command_is_booted_unless_someone_ended_it() {
        let killed = Outcome::Internal("the VMM process was ended by signal 9".into());
        let bus_error = Outcome::Internal("the VMM process was ended by signal 7".into());
        let crash = Outcome::Crash("triple fault".into());
        for (outcome, wanted) in [
            (crash, Some(true)),
            (Outcome::Panic, Some(true)),
            (Outcome::PowerOff, Some(true)),
            (bus_error, Some(true)),
            (killed, None),
            (Outcome::Forced, None),
            (Outcome::Quit, None),
            (Outcome::Signal(15), None),
        ] {
            let ending = ended(outcome.clone());
            assert_eq!(is_of_template(Answer::None, &ending), wanted, "{outcome:?}");
            // Its command may have run.
            assert_eq!(is_of_template(Answer::SetUp, &ending), None, "{outcome:?}");
        }
    }

    #[test]
    fn only_what_a_template_is_to_blame_for_takes_it_out_of_use() {
        let off = ended(Outcome::Forced);
        assert_eq!(is_of_template(Answer::Late, &off), Some(true));
        assert_eq!(is_of_template(Answer::Refused, &off), Some(false));
        let signalled = SessionEnd::Signalled(libc::SIGTERM);
        assert_eq!(fault(Answer::Late, &signalled, &off), None);
        for (class, wanted) in [
            (Class::Internal, Some(true)),
            (Class::Host, Some(false)),
            (Class::Config, None),
        ] {
            let failed = Err(Failure::new(class, "failed"));
            assert_eq!(is_of_template(Answer::None, &failed), wanted, "{class:?}");
        }
        let failed = Err(Failure::signalled(libc::SIGINT));
        assert_eq!(is_of_template(Answer::None, &failed), None);
    }
}
