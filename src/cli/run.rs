//! `mayfly run`

use std::ffi::OsString;
use std::process::ExitCode;

use super::output;
use crate::run::{self, Options};
use crate::timing::Timeline;

const EXAMPLES: &str = "\
Examples:
  mayfly run demo echo hello
  mayfly run --rm -it debian bash
  mayfly run --rm -v ./src:/src:ro -v data:/data -w /src debian make
  mayfly run -d --name web -p 8080:80 nginx
  mayfly run --net none --memory 256M --timeout 10s demo sh -c 'wc -c < /dev/zero'

A VM in the foreground is this process, and cannot be left. Start it with -d -it, and
use mayfly attach: Ctrl-P Ctrl-Q leaves that.

Exit status: the command's own; 128+N if a signal ended it; 124 after --timeout;
125 if mayfly failed; 126 if the command can't be executed; 127 if there is none.";

/// Flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// What is wanted.
    #[command(flatten)]
    pub(super) options: Options,
}

/// Runs an image; mayfly's own failures have a status that commands hardly use.
/// `words` are those of the command line behind the verb.
pub fn run(args: Args, words: &[OsString], timeline: Timeline) -> ExitCode {
    let status = run::run(args.options, words, timeline).unwrap_or_else(|failure| {
        output::report(&failure);
        failure.signal_status().unwrap_or(run::STATUS_FAILED)
    });
    ExitCode::from(status)
}
