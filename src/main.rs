//! Dispatch and exit code, nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    if mayfly::vmm::is_vmm() {
        mayfly::vmm::run();
    }
    mayfly::cli::run()
}
