//! A comparison, from its first instance to its last.

mod isolation;
mod load;
mod memory;
mod steady;
mod verdict;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use mayfly_image::Progress;
use mayfly_protocol::facts::Facts;
use rustix::process::Pid;
use serde_json::Value;

use super::engines::{self, Engine, Job, Place};
use super::guard::{self, Workspace};
use super::instance::batch::{Batch, BatchError, Ends};
use super::instance::{Instance, Launch};
use super::model::{EngineReport, FORMAT, PageCache, Report, Workload};
use super::options::{Measure, Options};
use super::removal::remove_directory;
use super::statistics::noise;
use super::{host, order, prepare};
use crate::error::{Context, Error};

/// Stands for an instance's name in a record.
const ID: &str = "{id}";

/// Whom we compare, and what we know of each.
struct Part {
    engine: Box<dyn Engine>,
    report: EngineReport,
}

/// A comparison.
pub struct Session<'a> {
    options: &'a Options,
    workspace: &'a Workspace,
    ends: Ends,
    place: Place<'a>,
    parts: Vec<Part>,
    missing: Vec<EngineReport>,
    /// The engines in which the command failed when they were tried, and its exit status.
    refused: Vec<(String, i32)>,
    /// How many were launched, of those that count, and of those before.
    launched: u32,
    taken: u32,
    warmed: u32,
    report: Report,
    host: Option<Facts>,
}

/// Why an engine is not compared as it is.
struct Refusal {
    why: String,
    /// It took too long.
    late: bool,
    /// The engine did what it should, and the command failed with this exit status.
    command: Option<i32>,
}

/// The reason why a comparison goes no further.
enum Stop {
    /// Somebody wants an end: what there is counts.
    Interrupted,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(failure: Error) -> Self {
        Stop::Failed(failure)
    }
}

impl<'a> Session<'a> {
    /// Prepares the image, and finds the engines; then begins.
    pub fn new(
        options: &'a Options,
        progress: &dyn Progress,
        workspace: &'a Workspace,
        begin: impl FnOnce(Vec<Pid>) -> Result<Ends, Error>,
    ) -> Result<Self, Error> {
        let (place, image) = prepare::prepare(options, progress, workspace)?;
        let (parts, missing) = find(options, workspace, &place)?;
        let residents = parts.iter().flat_map(|part| part.engine.residents());
        let ends = begin(residents.collect())?;
        let started = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let mut report = Report {
            format: FORMAT,
            mayfly: options.mayfly.version.clone(),
            started_ms: u64::try_from(started.as_millis()).unwrap_or(0),
            seed: options.seed,
            runs: options.runs,
            warmup: options.warmup,
            page_cache: match options.drop_caches {
                true => PageCache::Dropped,
                false => PageCache::Warm,
            },
            interrupted: false,
            host: host::describe(),
            workload: Workload {
                image: options.image.clone(),
                image_id: image.id.to_string(),
                command: options.command.clone(),
                cpus: options.cpus,
                memory_mib: options.memory_mib,
                guest: prepare::guest_files(&place)?,
            },
            engines: Vec::new(),
            order: Vec::new(),
            warnings: Vec::new(),
        };
        if options.drop_caches && guard::in_memory(&place.root) {
            let warning =
                "--drop-caches: /var/tmp is in memory, and so the image's files stay there";
            report.warnings.push(warning.into());
        }
        Ok(Session {
            options,
            workspace,
            ends,
            place,
            parts,
            missing,
            refused: Vec::new(),
            launched: 0,
            taken: 0,
            warmed: 0,
            report,
            host: None,
        })
    }

    /// Runs it all, and returns what it found, also if a failure ended it early.
    pub fn run(&mut self) -> Result<(Report, Option<Error>), Error> {
        let watch = host::Watch::start();
        let stop = self.take_all().err();
        watch.end(&mut self.report.host);
        for part in &self.parts {
            super::undo::undo(&part.engine.undo());
        }
        let mut failed = None;
        match stop {
            None => {
                failed = self.verdict();
                let told = failed.as_ref().map(Error::text);
                self.report.warnings.extend(told);
            }
            Some(Stop::Interrupted) => self.report.interrupted = true,
            Some(Stop::Failed(failure)) => {
                if self.parts.iter().all(|part| part.report.samples.is_empty()) {
                    return Err(failure);
                }
                // What was measured is worth more than the rest.
                self.report.interrupted = true;
                self.report.warnings.push(failure.text());
                failed = Some(failure);
            }
        }
        self.tell("");
        let warnings = host::warnings(&self.report.host);
        self.report.warnings.extend(warnings);
        for part in &mut self.parts {
            let about = part.engine.about();
            part.report.network = about.network;
            part.report.notes.splice(0..0, about.notes);
            part.report.sum_up();
            let starts: Vec<u64> = part
                .report
                .samples
                .iter()
                .filter_map(|it| it.start())
                .collect();
            self.report
                .warnings
                .extend(noise(&part.report.name, &starts));
        }
        let reports = self.parts.drain(..).map(|part| part.report);
        self.report.engines = reports.chain(self.missing.drain(..)).collect();
        Ok((self.report.clone(), failed))
    }

    fn take_all(&mut self) -> Result<(), Stop> {
        self.try_all()?;
        let wanted = |measure| self.options.measures.contains(&measure);
        let [start, memory, load, steady, isolation] = [
            Measure::Start,
            Measure::Memory,
            Measure::Load,
            Measure::Steady,
            Measure::Isolation,
        ]
        .map(wanted);
        if start {
            self.take_starts()?;
        }
        if isolation {
            self.measure_isolation()?;
        }
        if memory {
            self.measure_memory()?;
        }
        if load {
            self.measure_load()?;
        }
        if steady {
            self.measure_steady()?;
        }
        Ok(())
    }

    /// Starts each engine once: one that fails twice is asked for less, until it works or
    /// is missing.
    fn try_all(&mut self) -> Result<(), Stop> {
        let mut index = 0;
        while index < self.parts.len() {
            let name = self.parts[index].report.name.clone();
            self.tell(&format!("trying {name}"));
            // What fails but once is an accident, and not all that it can do here. Who is
            // late is so again.
            let tried = match self.try_one(index)? {
                Some(Refusal { late: false, .. }) => self.try_one(index)?,
                other => other,
            };
            let Some(Refusal { why, command, .. }) = tried else {
                index += 1;
                continue;
            };
            let part = &mut self.parts[index];
            // What is launched from now on is something else.
            part.report.command_line.clear();
            if command.is_none() && part.engine.ask_less() {
                let note = format!("asked for less, as it failed: {why}");
                if !part.report.notes.contains(&note) {
                    part.report.notes.push(note);
                }
            } else {
                let part = self.parts.remove(index);
                super::undo::undo(&part.engine.undo());
                let what = match command {
                    Some(_) => "the command fails in it",
                    None => "it does not work here",
                };
                self.refused
                    .extend(command.map(|status| (name.clone(), status)));
                self.missing.push(EngineReport {
                    missing: Some(format!("{what}: {why}")),
                    ..part.report
                });
            }
        }
        Ok(())
    }

    /// Starts an engine once, and returns why it failed.
    fn try_one(&mut self, index: usize) -> Result<Option<Refusal>, Stop> {
        match self.one(index, &self.run_words(), None) {
            Ok(instance) => {
                let notes = &mut self.parts[index].report.notes;
                for note in &instance.notes {
                    if !notes.contains(note) {
                        notes.push(note.clone());
                    }
                }
                let late = !instance.ended();
                // If its launcher failed as well, that may be why.
                let command = instance.failed_command();
                Ok(instance.error().map(|why| Refusal { why, late, command }))
            }
            Err(Stop::Failed(failure)) => Ok(Some(Refusal {
                why: failure.text(),
                late: false,
                command: None,
            })),
            Err(stop) => Err(stop),
        }
    }

    fn take_starts(&mut self) -> Result<(), Stop> {
        let all = self.options.warmup.saturating_add(self.options.runs);
        let rounds = order::rounds(self.options.seed, self.parts.len(), all);
        for (round, order) in (0..).zip(rounds) {
            let counts = round >= self.options.warmup;
            let number = round.checked_sub(self.options.warmup).unwrap_or(round);
            for index in order {
                let name = &self.parts[index].report.name;
                self.tell(&match counts {
                    true => format!("run {} of {}: {name}", number + 1, self.options.runs),
                    false => format!("warming up: {name}"),
                });
                if self.options.drop_caches {
                    rustix::fs::sync();
                    fs::write("/proc/sys/vm/drop_caches", "3").or_host("--drop-caches")?;
                }
                let instance = self.one(index, &self.run_words(), None)?;
                let report = &mut self.parts[index].report;
                if !counts {
                    report.warmups.push(instance.sample(number, self.warmed));
                    self.warmed += 1;
                    continue;
                }
                report.samples.push(instance.sample(number, self.taken));
                self.taken += 1;
                let index = u32::try_from(index).unwrap_or(u32::MAX);
                self.report.order.push(index);
            }
        }
        Ok(())
    }

    fn run_words(&self) -> Vec<String> {
        let command = self.options.command.iter().cloned();
        ["run".to_owned()].into_iter().chain(command).collect()
    }

    /// Launches one, and sees it to its end, whichever that is.
    fn one(
        &mut self,
        index: usize,
        words: &[String],
        volume: Option<PathBuf>,
    ) -> Result<Instance, Stop> {
        let mut batch = Batch::default();
        self.launch(index, words, volume, &mut batch)?;
        let ended = batch.wait_for_end(&self.ends, self.options.timeout);
        let instances = match ended {
            Ok(()) => batch.instances,
            Err(BatchError::Interrupted) => {
                batch.end(&self.ends);
                return Err(Stop::Interrupted);
            }
            Err(BatchError::Late(_)) => batch.abandon(&self.ends),
            Err(BatchError::Io(error)) => {
                return Err(error).or_host("an instance").map_err(Stop::Failed);
            }
        };
        self.clean_up(&instances)?;
        let instance = instances.into_iter().next();
        instance.ok_or(Stop::Failed(Error::host("nothing was launched")))
    }

    fn launch(
        &mut self,
        index: usize,
        words: &[String],
        volume: Option<PathBuf>,
        batch: &mut Batch,
    ) -> Result<(), Stop> {
        let launch = self.prepare(index, words, volume)?;
        self.workspace.note(&self.undo_of(batch, [&launch]))?;
        let what = self.parts[index].report.name.clone();
        batch.launch(launch).or_host(what).map_err(Stop::Failed)
    }

    /// What removes instances, and what engines keep.
    fn undo_of<'b>(
        &self,
        batch: &'b Batch,
        next: impl IntoIterator<Item = &'b Launch>,
    ) -> Vec<Vec<OsString>> {
        let launches = batch.launches().chain(next);
        let instances = launches.flat_map(|launch| launch.undo.iter().cloned());
        let engines = self.parts.iter().flat_map(|part| part.engine.undo());
        instances.chain(engines).collect()
    }

    /// What is launched next, and a directory for it.
    fn prepare(
        &mut self,
        index: usize,
        words: &[String],
        volume: Option<PathBuf>,
    ) -> Result<Launch, Error> {
        let number = self.launched;
        self.launched += 1;
        let id = format!("mayfly-compare-{}-{number}", std::process::id());
        let directory = self.workspace.directory.join(format!("instance-{number}"));
        fs::create_dir(&directory).or_host(directory.display())?;
        let job = Job {
            nonce: format!(
                "{:08x}",
                std::process::id().wrapping_mul(0x9e37_79b1) ^ number
            ),
            words: words.to_vec(),
            directory,
            volume,
            id,
        };
        let part = &mut self.parts[index];
        let mut launch = part.engine.launch(&self.place, &job)?;
        launch.env.push(self.workspace.mark());
        if part.report.command_line.is_empty() {
            let general = |text: &str| {
                text.replace(&job.id, ID)
                    .replace(&job.nonce, "{nonce}")
                    .replace(&format!("instance-{number}"), "{instance}")
            };
            let words = launch.command.iter();
            part.report.command_line = words.map(|it| general(&it.to_string_lossy())).collect();
            part.report.settings = settings(&job.directory, general);
        }
        Ok(launch)
    }

    /// Removes what instances left that did not end as they should, and forgets them.
    fn clean_up(&self, instances: &[Instance]) -> Result<(), Error> {
        let failed = instances.iter().filter(|it| it.error().is_some());
        failed.for_each(Instance::undo);
        self.forget()
    }

    /// Nothing of instances is left: neither in the journal nor on disk.
    fn forget(&self) -> Result<(), Error> {
        self.workspace.note(&self.undo_of(&Batch::default(), []))?;
        for entry in fs::read_dir(&self.workspace.directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(b"instance-")
            {
                let _ = remove_directory(&entry.path());
            }
        }
        Ok(())
    }

    /// Says what is being done, where somebody looks.
    fn tell(&self, what: &str) {
        let mut errors = std::io::stderr();
        if errors.is_terminal() {
            let _ = write!(errors, "\r\x1b[2K{what}");
            let _ = errors.flush();
        }
    }
}

/// What an engine has written for an instance to read, before it is launched.
fn settings(directory: &Path, general: impl Fn(&str) -> String) -> BTreeMap<String, Value> {
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let held = |file: fs::DirEntry| {
        let path = file.path();
        // Others may be pipes, which nobody writes to yet.
        path.extension().filter(|it| *it == "json")?;
        let text = fs::read_to_string(&path).ok()?;
        let value = serde_json::from_str(&general(&text)).ok()?;
        Some((file.file_name().to_string_lossy().into_owned(), value))
    };
    files.filter_map(held).collect()
}

/// Finds the engines that are wanted, has each prepare itself, and tells who is missing.
fn find(
    options: &Options,
    workspace: &Workspace,
    place: &Place,
) -> Result<(Vec<Part>, Vec<EngineReport>), Error> {
    let wanted: Vec<&str> = match options.engines.is_empty() {
        true => engines::NAMES.to_vec(),
        false => options.engines.iter().map(String::as_str).collect(),
    };
    let mut parts = Vec::<Part>::new();
    let mut missing = Vec::new();
    let mut kept = Vec::new();
    for name in wanted {
        let found = engines::find(name, place);
        let kind = engines::kind(name);
        let name = name.split('=').next().unwrap_or(name);
        let prepared = match found {
            Ok(mut engine) => {
                let undo = engine.undo();
                kept.extend(undo.iter().cloned());
                workspace.note(&kept)?;
                let prepared = engine.prepare(place);
                if prepared.is_err() {
                    super::undo::undo(&undo);
                }
                prepared.map(|()| engine)
            }
            Err(why) => Err(why),
        };
        match prepared {
            Ok(engine) => parts.push(Part {
                report: EngineReport {
                    version: engine.about().version,
                    ..EngineReport::new(name, kind)
                },
                engine,
            }),
            Err(why) => missing.push(EngineReport {
                missing: Some(why),
                ..EngineReport::new(name, kind)
            }),
        }
    }
    Ok((parts, missing))
}
