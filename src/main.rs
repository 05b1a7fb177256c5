//! Dispatch and exit code, nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    mayfly::cli::run()
}
