//! The log: one line a message on standard error or in a file. A guest can
//! cause messages without end, so only [`BURST`] of them pass in a second.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};
use serde::{Deserialize, Serialize};

use crate::config::keys::{FromKeys, Keys};
use crate::failure::{Failure, OrFail};

const SYNTAX: &str = "error|warn|info|debug|trace[,file=F][,json]";
/// Messages that pass in an [`INTERVAL`].
const BURST: u32 = 50;
const INTERVAL: Duration = Duration::from_secs(1);
/// A longer message is cut.
const MESSAGE_MAX: usize = 1024;

/// What is logged, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// Less important messages are left out.
    pub level: LevelFilter,
    /// Appended to; else standard error.
    pub file: Option<PathBuf>,
    /// One JSON object a line.
    pub json: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig {
            level: LevelFilter::Warn,
            file: None,
            json: false,
        }
    }
}

impl FromStr for LogConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_text(text.as_ref())
    }
}

impl FromKeys for LogConfig {
    const SYNTAX: &'static str = SYNTAX;
    const WORD: Option<&'static str> = Some("level");

    fn from_keys(mut keys: Keys) -> Result<Self, String> {
        let level = keys.word().unwrap_or_default();
        let config = LogConfig {
            level: level
                .parse()
                .map_err(|_| format!("{level:?} is no level; write {SYNTAX}"))?,
            file: keys.path("file")?,
            json: keys.flag("json")?,
        };
        keys.finish()?;
        Ok(config)
    }
}

/// What is logged, and how a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogStyle {
    /// Less important messages are left out.
    level: LevelFilter,
    /// One JSON object a line.
    json: bool,
}

impl LogConfig {
    /// What is logged, and how, wherever that goes.
    pub fn style(&self) -> LogStyle {
        LogStyle {
            level: self.level,
            json: self.json,
        }
    }

    /// Starts to log, to standard error until there is a file.
    pub fn start(&self) -> Started {
        self.style().start()
    }
}

impl LogStyle {
    /// Starts to log, to standard error until there is a file.
    pub fn start(&self) -> Started {
        let state = Arc::new(Mutex::new(State {
            file: None,
            window: Instant::now(),
            budget: BURST,
            lost: 0,
        }));
        let logger = Logger {
            level: self.level,
            json: self.json,
            state: state.clone(),
        };
        // Only refused when there is one already.
        if log::set_boxed_logger(Box::new(logger)).is_ok() {
            log::set_max_level(self.level);
        }
        Started(state)
    }
}

/// A log that has begun.
pub struct Started(Arc<Mutex<State>>);

impl Started {
    /// Goes on in a file.
    pub fn go_on_in(&self, file: Option<File>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).file = file;
    }
}

impl LogConfig {
    /// Opens the file that was asked for, which is made if need be.
    pub fn open_file(&self) -> Result<Option<File>, Failure> {
        let Some(path) = &self.file else {
            return Ok(None);
        };
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .or_host(format_args!("--log file={}", path.display()))?;
        Ok(Some(file))
    }
}

struct Logger {
    level: LevelFilter,
    json: bool,
    state: Arc<Mutex<State>>,
}

struct State {
    file: Option<File>,
    window: Instant,
    budget: u32,
    lost: u64,
}

impl State {
    /// True if a message may pass now; and how many did not until now.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.window) >= INTERVAL {
            self.window = now;
            self.budget = BURST;
        }
        match self.budget.checked_sub(1) {
            Some(left) => {
                self.budget = left;
                Some(std::mem::take(&mut self.lost))
            }
            None => {
                self.lost += 1;
                None
            }
        }
    }

    fn write(&mut self, line: &str) {
        // A log that cannot be written is no reason to end a VM.
        let _ = match &mut self.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= self.level
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lost) = state.admit(Instant::now()) else {
            return;
        };
        let time = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        if lost > 0 {
            let message = format!("{lost} messages were left out");
            state.write(&line(
                self.json,
                time,
                Level::Warn,
                module_path!(),
                &message,
            ));
        }
        let message = record.args().to_string();
        state.write(&line(
            self.json,
            time,
            record.level(),
            record.target(),
            &message,
        ));
    }

    fn flush(&self) {}
}

/// A line: times are seconds since 1970, control characters are left out.
fn line(json: bool, time: Duration, level: Level, target: &str, message: &str) -> String {
    let visible = |character: &char| !character.is_control();
    let message: String = message.chars().filter(visible).take(MESSAGE_MAX).collect();
    let seconds = time.as_secs_f64();
    match json {
        true => {
            let object = serde_json::json!({
                "time": seconds, "level": level.as_str(), "target": target, "message": message,
            });
            format!("{object}\n")
        }
        false => format!("mayfly: {seconds:.6} {level} {target}: {message}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let config: LogConfig = "debug,json,file=a,,b".parse().unwrap();
        assert_eq!(config.level, LevelFilter::Debug);
        assert_eq!(config.file, Some("a,b".into()));
        assert!(config.json);
        for wrong in ["", "loud", "warn,file=", "warn,xml", "file=a"] {
            assert!(wrong.parse::<LogConfig>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let start = Instant::now();
        let mut state = State {
            file: None,
            window: start,
            budget: BURST,
            lost: 0,
        };
        let passed = (0..1000).filter(|_| state.admit(start).is_some()).count();
        assert_eq!(passed, BURST as usize);
        let later = start + INTERVAL;
        assert_eq!(state.admit(later), Some(1000 - u64::from(BURST)));
        assert_eq!(state.admit(later), Some(0));
    }

    #[test]
    fn a_line_is_one_line_of_bounded_length() {
        let message = format!("a\nb\u{1b}[31m{}", "x".repeat(5000));
        for json in [false, true] {
            let text = line(
                json,
                Duration::from_millis(1500),
                Level::Warn,
                "t",
                &message,
            );
            assert_eq!(text.matches('\n').count(), 1);
            assert!(text.len() < MESSAGE_MAX + 200 && !text.contains('\u{1b}'));
            assert!(text.contains("1.5"), "{text}");
        }
    }
}
