//! How far long work is, as bars on a terminal.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use mayfly_image::{Progress, Task};

/// Bars on standard error, if that is a terminal.
pub struct Bars(MultiProgress);

/// How often a bar is drawn again, if only to show that something lives.
const TICK: Duration = Duration::from_millis(200);

impl Bars {
    /// None where nobody looks.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr_with_hz(10),
            false => ProgressDrawTarget::hidden(),
        };
        Bars(MultiProgress::with_draw_target(target))
    }
}

struct Bar(MultiProgress, ProgressBar);

impl Progress for Bars {
    fn begin(&self, what: &str, total: Option<u64>) -> Box<dyn Task> {
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "{msg:<32} {wide_bar} {bytes:>10}/{total_bytes:<10} {bytes_per_sec:>12}",
            ),
            None => (
                ProgressBar::new_spinner(),
                "{msg:<32} {spinner} {bytes:>10}",
            ),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let bar = self.0.add(bar).with_message(what.to_owned());
        bar.enable_steady_tick(TICK);
        Box::new(Bar(self.0.clone(), bar))
    }
}

impl Task for Bar {
    fn advance(&self, bytes: u64) {
        self.1.inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.1.finish_and_clear();
        self.0.remove(&self.1);
    }
}
