//! A comparison, from its first instance to its last.

use std::ffi::OsString;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mayfly_guest::facts::Facts;
use rustix::process::Pid;

use super::engines::{self, Engine, Job, Place, VOLUME};
use super::facts::isolation;
use super::guard::{self, Scene};
use super::instance::{Batch, BatchError, Ends, Instance, Launch};
use super::model::{EngineReport, FORMAT, Figure, Kind, Load, Mark, PageCache, Report, Workload};
use super::statistics::{Summary, noise};
use super::{Measure, Options, host, order, prepare, processes};
use crate::failure::{Failure, OrFail};

/// How many instances idle when memory is looked at.
const IDLE: [u32; 4] = [1, 2, 5, 10];
/// One that has come to its command is left alone so long before it is looked at.
const SETTLE: Duration = Duration::from_millis(500);
/// What is left to the host of its free memory.
const SPARE_MIB: u64 = 512;
/// What the command is told it is, in a record.
const ID: &str = "{id}";

/// Whom we compare, and what we know of each.
struct Part {
    engine: Box<dyn Engine>,
    report: EngineReport,
}

/// A comparison.
pub struct Session<'a> {
    options: &'a Options,
    scene: &'a Scene,
    ends: Ends,
    place: Place,
    parts: Vec<Part>,
    missing: Vec<EngineReport>,
    /// How many were launched, and of those that count.
    launched: u32,
    taken: u32,
    report: Report,
    host: Option<Facts>,
}

/// Why it goes no further.
enum Stop {
    /// Somebody wants an end: what there is counts.
    Interrupted,
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Stop::Failed(failure)
    }
}

impl<'a> Session<'a> {
    /// Prepares the image, and finds the engines; then begins.
    pub fn new(
        options: &'a Options,
        scene: &'a Scene,
        begin: impl FnOnce(Vec<Pid>) -> Result<Ends, Failure>,
    ) -> Result<Self, Failure> {
        let (place, image) = prepare::prepare(options, scene)?;
        let (parts, missing) = find(options, scene, &place)?;
        let residents = parts.iter().flat_map(|part| part.engine.residents());
        let ends = begin(residents.collect())?;
        let started = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let mut report = Report {
            format: FORMAT,
            mayfly: env!("CARGO_PKG_VERSION").into(),
            started_ms: u64::try_from(started.as_millis()).unwrap_or(0),
            seed: options.seed,
            runs: options.runs,
            warmup: options.warmup,
            page_cache: match options.drop_caches {
                true => PageCache::Dropped,
                false => PageCache::Warm,
            },
            interrupted: false,
            host: host::look(),
            workload: Workload {
                image: options.image.clone(),
                image_id: image.id.to_string(),
                command: options.command.clone(),
                cpus: options.cpus,
                memory_mib: options.memory_mib,
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
            scene,
            ends,
            place,
            parts,
            missing,
            launched: 0,
            taken: 0,
            report,
            host: None,
        })
    }

    /// Runs it all, and returns what it found, also if it was ended early.
    pub fn run(&mut self) -> Result<Report, Failure> {
        let stop = self.take_all().err();
        for part in &self.parts {
            super::undo::undo(&part.engine.undo());
        }
        match stop {
            None => {}
            Some(Stop::Interrupted) => self.report.interrupted = true,
            Some(Stop::Failed(failure)) => {
                if self.parts.iter().all(|part| part.report.samples.is_empty()) {
                    return Err(failure);
                }
                // What was measured is worth more than the rest.
                self.report.interrupted = true;
                self.report.warnings.push(failure.to_string());
            }
        }
        self.tell("");
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
        Ok(self.report.clone())
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
            self.look_around()?;
        }
        if memory {
            self.weigh()?;
        }
        if load {
            self.load()?;
        }
        if steady {
            self.work()?;
        }
        Ok(())
    }

    /// Starts each engine once: one that fails is asked for less, until it works or is
    /// missing.
    fn try_all(&mut self) -> Result<(), Stop> {
        let mut index = 0;
        while index < self.parts.len() {
            let name = self.parts[index].report.name.clone();
            self.tell(&format!("trying {name}"));
            let error = match self.one(index, &self.run_words(), None) {
                Ok(instance) => {
                    for note in &instance.notes {
                        if !self.parts[index].report.notes.contains(note) {
                            self.parts[index].report.notes.push(note.clone());
                        }
                    }
                    instance.error()
                }
                Err(Stop::Failed(failure)) => Some(failure.to_string()),
                Err(stop) => return Err(stop),
            };
            let Some(error) = error else {
                index += 1;
                continue;
            };
            // What is launched from now on is something else.
            self.parts[index].report.command_line.clear();
            if !self.parts[index].engine.ask_less() {
                let part = self.parts.remove(index);
                super::undo::undo(&part.engine.undo());
                self.missing.push(EngineReport {
                    missing: Some(format!("it does not work here: {error}")),
                    ..part.report
                });
            }
        }
        Ok(())
    }

    fn take_starts(&mut self) -> Result<(), Stop> {
        let all = self.options.warmup.saturating_add(self.options.runs);
        let rounds = order::rounds(self.options.seed, self.parts.len(), all);
        for (round, order) in (0..).zip(rounds) {
            let counts = round >= self.options.warmup;
            let number = round.saturating_sub(self.options.warmup);
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
                if counts {
                    let sample = instance.sample(number, self.taken);
                    self.taken += 1;
                    self.report
                        .order
                        .push(u32::try_from(index).unwrap_or(u32::MAX));
                    self.parts[index].report.samples.push(sample);
                }
            }
        }
        Ok(())
    }

    /// Looks from inside of each.
    fn look_around(&mut self) -> Result<(), Stop> {
        let words = vec!["facts".to_owned()];
        let host = Part {
            report: EngineReport::absent("process", String::new()),
            engine: engines::find("process", &self.place).map_err(Failure::host)?,
        };
        self.parts.push(host);
        let facts = self.one(self.parts.len() - 1, &words, None);
        self.parts.pop();
        self.host = facts?
            .data
            .and_then(|data| serde_json::from_str(&data).ok());
        for index in 0..self.parts.len() {
            self.tell(&format!("isolation: {}", self.parts[index].report.name));
            let instance = self.one(index, &words, None)?;
            let facts: Option<Facts> = instance
                .data
                .as_ref()
                .and_then(|data| serde_json::from_str(data).ok());
            let part = &mut self.parts[index].report;
            match (facts, &self.host) {
                (Some(facts), Some(host)) => part.isolation = Some(isolation(part, &facts, host)),
                _ => part.notes.push(match instance.error() {
                    Some(error) => format!("what it shows of the host could not be seen: {error}"),
                    None => "what it shows of the host could not be seen".into(),
                }),
            }
        }
        Ok(())
    }

    /// Weighs instances that idle.
    fn weigh(&mut self) -> Result<(), Stop> {
        let words = vec!["hold".to_owned()];
        for index in 0..self.parts.len() {
            if !self.parts[index].engine.can_be_weighed() {
                continue;
            }
            let name = self.parts[index].report.name.clone();
            let mut batch = Batch::default();
            for wanted in IDLE {
                if self.parts[index].report.kind == Kind::Vm && !self.has_room(wanted) {
                    let note = format!("memory: {wanted} at once do not fit into this host");
                    self.parts[index].report.notes.push(note);
                    break;
                }
                self.tell(&format!("memory: {wanted} of {name}"));
                let mut launched = Ok(());
                while launched.is_ok() && batch.instances.len() < wanted as usize {
                    launched = self.launch(index, &words, None, &mut batch);
                }
                if let Err(Stop::Failed(failure)) = launched {
                    let note = format!("memory: {failure}");
                    self.parts[index].report.notes.push(note);
                    break;
                }
                let there = |it: &Instance| it.has(Mark::Command) || it.ended();
                let settled = batch
                    .until(&self.ends, self.options.patience, there)
                    .and_then(|()| batch.rest(&self.ends, SETTLE));
                let failed = batch.instances.iter().find(|it| it.ended());
                let failed = failed.map(|it| it.error().unwrap_or_else(|| "it ended".into()));
                match (settled, failed) {
                    (Err(BatchError::Interrupted), _) => {
                        batch.end(&self.ends);
                        return Err(Stop::Interrupted);
                    }
                    (Err(error), _) => {
                        self.parts[index]
                            .report
                            .notes
                            .push(format!("memory: {error}"));
                        break;
                    }
                    (Ok(()), Some(error)) => {
                        self.parts[index]
                            .report
                            .notes
                            .push(format!("memory: {error}"));
                        break;
                    }
                    (Ok(()), None) => {}
                }
                let Some(point) = processes::memory(wanted, &self.ends.residents) else {
                    let note = "memory: only root may look at its processes";
                    self.parts[index].report.notes.push(note.into());
                    break;
                };
                self.parts[index].report.memory.push(point);
            }
            batch.end(&self.ends);
            self.forget()?;
        }
        Ok(())
    }

    fn has_room(&self, instances: u32) -> bool {
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"));
        let kib: u64 = line
            .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
            .unwrap_or(0);
        u64::from(instances) * self.options.memory_mib + SPARE_MIB <= kib >> 10
    }

    /// Starts many at once.
    fn load(&mut self) -> Result<(), Stop> {
        let at_once = self.options.parallel;
        for index in 0..self.parts.len() {
            let name = self.parts[index].report.name.clone();
            self.tell(&format!("{at_once} at once: {name}"));
            let mut batch = Batch::default();
            let words = self.run_words();
            // All is prepared before the first is launched.
            let mut launches = Vec::new();
            for _ in 0..at_once {
                launches.push(self.prepare(index, &words, None)?);
            }
            self.scene.note(&self.undo_of(&batch, &launches))?;
            let mut launched = Ok(());
            for launch in launches {
                launched = batch.launch(launch).map_err(BatchError::Io);
                // Who is quick is seen at once.
                launched = launched.and_then(|()| batch.turn(&self.ends, Duration::ZERO));
                if launched.is_err() {
                    break;
                }
            }
            let ended =
                launched.and_then(|()| batch.wait_for_end(&self.ends, self.options.patience));
            let instances = match ended {
                Ok(()) => batch.instances,
                Err(BatchError::Interrupted) => {
                    batch.end(&self.ends);
                    return Err(Stop::Interrupted);
                }
                Err(error) => {
                    let note = format!("{at_once} at once: {error}");
                    self.parts[index].report.notes.push(note);
                    batch.abandon(&self.ends)
                }
            };
            self.clean_up(&instances)?;
            let good = instances.iter().filter(|it| it.error().is_none());
            let starts_ns: Vec<u64> = good
                .filter_map(|it| it.since_launch(Mark::Command))
                .collect();
            let first = instances.iter().map(Instance::launched).min().unwrap_or(0);
            let last = instances.iter().filter_map(|it| it.at(Mark::Command)).max();
            let span = last.unwrap_or(first).saturating_sub(first) as f64 / 1e9;
            self.parts[index].report.load = Some(Load {
                at_once,
                start: Summary::of(&starts_ns),
                starts_per_second: match span > 0.0 {
                    true => starts_ns.len() as f64 / span,
                    false => 0.0,
                },
                failed: at_once.saturating_sub(u32::try_from(starts_ns.len()).unwrap_or(0)),
                starts_ns,
            });
        }
        Ok(())
    }

    /// Lets each do usual work.
    fn work(&mut self) -> Result<(), Stop> {
        let volume = self.scene.folder.join("volume");
        fs::create_dir_all(&volume).or_host(volume.display())?;
        for index in 0..self.parts.len() {
            self.tell(&format!("at work: {}", self.parts[index].report.name));
            let mut words = vec!["steady".to_owned()];
            let volume = self.parts[index]
                .engine
                .has_volumes()
                .then(|| volume.clone());
            if volume.is_some() {
                words.push(format!("volume={VOLUME}"));
            }
            let instance = self.one(index, &words, volume)?;
            let figures: Option<Vec<Figure>> = instance
                .data
                .as_ref()
                .and_then(|data| serde_json::from_str(data).ok());
            let report = &mut self.parts[index].report;
            match (figures, instance.error()) {
                (Some(figures), _) => report.steady = figures,
                (None, error) => report.notes.push(format!(
                    "it could not be seen at work: {}",
                    error.unwrap_or_else(|| "it said nothing".into())
                )),
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
        let ended = batch.wait_for_end(&self.ends, self.options.patience);
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
        instance.ok_or(Stop::Failed(Failure::host("nothing was launched")))
    }

    fn launch(
        &mut self,
        index: usize,
        words: &[String],
        volume: Option<PathBuf>,
        batch: &mut Batch,
    ) -> Result<(), Stop> {
        let launch = self.prepare(index, words, volume)?;
        self.scene.note(&self.undo_of(batch, [&launch]))?;
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

    /// What is launched next, and a folder for it.
    fn prepare(
        &mut self,
        index: usize,
        words: &[String],
        volume: Option<PathBuf>,
    ) -> Result<Launch, Failure> {
        let number = self.launched;
        self.launched += 1;
        let id = format!("mayfly-compare-{}-{number}", std::process::id());
        let folder = self.scene.folder.join(format!("instance-{number}"));
        fs::create_dir(&folder).or_host(folder.display())?;
        let job = Job {
            nonce: format!(
                "{:08x}",
                std::process::id().wrapping_mul(0x9e37_79b1) ^ number
            ),
            words: words.to_vec(),
            folder,
            volume,
            id,
        };
        let part = &mut self.parts[index];
        let launch = part.engine.launch(&self.place, &job)?;
        if part.report.command_line.is_empty() {
            let text = launch
                .command
                .iter()
                .map(|word| word.to_string_lossy().into_owned());
            let general = text.map(|word| {
                word.replace(&job.id, ID)
                    .replace(&job.nonce, "{nonce}")
                    .replace(&format!("instance-{number}"), "{instance}")
            });
            part.report.command_line = general.collect();
        }
        Ok(launch)
    }

    /// Removes what instances left that did not end as they should, and forgets them.
    fn clean_up(&self, instances: &[Instance]) -> Result<(), Failure> {
        let failed = instances.iter().filter(|it| it.error().is_some());
        failed.for_each(Instance::undo);
        self.forget()
    }

    /// Nothing of instances is left: neither in the journal nor on disk.
    fn forget(&self) -> Result<(), Failure> {
        self.scene.note(&self.undo_of(&Batch::default(), []))?;
        for entry in fs::read_dir(&self.scene.folder)
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(b"instance-")
            {
                super::guard::remove_folder(&entry.path());
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

/// Finds the engines that are wanted, has each prepare itself, and tells who is missing.
fn find(
    options: &Options,
    scene: &Scene,
    place: &Place,
) -> Result<(Vec<Part>, Vec<EngineReport>), Failure> {
    let wanted: Vec<&str> = match options.engines.is_empty() {
        true => engines::NAMES.to_vec(),
        false => options.engines.iter().map(String::as_str).collect(),
    };
    let mut parts = Vec::<Part>::new();
    let mut missing = Vec::new();
    let mut kept = Vec::new();
    for name in wanted {
        let found = engines::find(name, place);
        let name = name.split('=').next().unwrap_or(name);
        let prepared = match found {
            Ok(mut engine) => {
                let undo = engine.undo();
                kept.extend(undo.iter().cloned());
                scene.note(&kept)?;
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
                report: blank(name, engine.as_ref()),
                engine,
            }),
            Err(why) => missing.push(EngineReport::absent(name, why)),
        }
    }
    Ok((parts, missing))
}

fn blank(name: &str, engine: &dyn Engine) -> EngineReport {
    let about = engine.about();
    EngineReport {
        kind: about.kind,
        version: about.version,
        missing: None,
        ..EngineReport::absent(name, String::new())
    }
}
