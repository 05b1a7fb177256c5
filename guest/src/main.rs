//! PID 1 of a mayfly guest: tells the VMM that it was reached, mounts, loads
//! modules, configures the network, runs what was asked for, powers off.
//!
//! With `root=` on the kernel's command line it makes way for the init of a
//! distribution on a disk (see `root.rs`). Else, what is asked for comes behind
//! `--` on the kernel's command line:
//!
//! | words     | what happens                                             |
//! |-----------|----------------------------------------------------------|
//! | (none)    | `/etc/mayfly/run` by sh if there is one, else a shell     |
//! | `run CMD` | the command and its arguments                            |
//! | `agent`   | what the host says over vsock: see `agent`                |
//! | `demo`    | prints what the guest sees of its machine                |
//! | `quit`    | nothing: powers off at once                              |
//! | `reboot`  | restarts                                                 |
//! | `panic`   | ends, which makes the kernel panic                       |
//!
//! When the power button is pressed, processes get SIGTERM before the
//! machine is turned off.
//!
//! The exit status (125 when init itself failed, 126 and 127 as a shell's,
//! 128 and more for signals) is written to a port of the VMM.

#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::string_slice))]

mod agent;
mod demo;
mod interface;
mod lines;
mod net;
mod port;
mod power_button;
mod registers;
mod root;
mod system;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;

use mayfly_protocol::init_words;

/// The lists of modules to load (see `boot/src/initramfs.rs`).
const MODULE_LIST: &str = "/etc/mayfly/modules";
const LATER_LIST: &str = "/etc/mayfly/modules-later";
/// Their loading can't be interrupted: by then, the host's command runs, or is over.
const SETTLED: std::time::Duration = std::time::Duration::from_millis(200);
/// A script that is run instead of a shell.
const RUN_SCRIPT: &str = "/etc/mayfly/run";
const BUSYBOX: &str = "/bin/busybox";
/// Init itself failed.
const STATUS_FAILED: i32 = 125;

fn main() {
    registers::keep_to_saved();
    port::mark_boot();
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    match words.first().and_then(|word| word.to_str()) {
        Some("quit") => system::power_off(),
        Some("reboot") => system::restart(),
        _ => {}
    }
    let status = run(words).unwrap_or_else(|error| {
        eprintln!("mayfly-init: {error}");
        STATUS_FAILED
    });
    port::report_status(u8::try_from(status).unwrap_or(u8::MAX));
    system::power_off()
}

fn run(words: Vec<OsString>) -> Result<i32, String> {
    system::mount_all()?;
    let cmdline = system::read("/proc/cmdline")?;
    // Linux may have given only some of them.
    let words = match init_words::behind(cmdline.as_bytes()) {
        Some(words) => words.into_iter().map(OsString::from_vec).collect(),
        None => words,
    };
    let words = words.as_slice();
    system::load_modules(Path::new(MODULE_LIST))?;
    if words == ["agent"] {
        return serve_host();
    }
    lines::adopt_console();
    lines::link_channels();
    if Path::new(BUSYBOX).exists() {
        // Without a shell's tools most guests are useless, but not all.
        let _ = system::status_of(Command::new(BUSYBOX).args(["--install", "-s", "/bin"]));
    }
    // A kernel may have no network.
    let _ = interface::turn_on("lo");
    if let Some(config) = net::from_cmdline(&cmdline)? {
        net::configure(&config)?;
    }
    let root = root::from_cmdline(&cmdline).filter(|_| root::in_initramfs());
    if words == ["panic"] {
        load_later();
        std::process::exit(1);
    }
    if let Some(root) = root {
        load_later();
        return root::switch(&root, words);
    }
    // Without the thread the guest still does its work.
    let _ = std::thread::Builder::new().spawn(|| {
        system::give_way();
        load_later();
        power_button::watch();
    });
    match words {
        [] if Path::new(RUN_SCRIPT).exists() => {
            Ok(system::status_of(Command::new("/bin/sh").arg(RUN_SCRIPT)))
        }
        [] => Ok(system::interactive("/bin/sh")),
        [verb] if verb == "demo" => {
            demo::show();
            Ok(0)
        }
        [verb, program, arguments @ ..] if verb == "run" => {
            Ok(system::status_of(Command::new(program).args(arguments)))
        }
        _ => Err(format!(
            "unknown words behind -- on the command line: {}",
            words.join(OsStr::new(" ")).display()
        )),
    }
}

/// Is a machine for the host's command. Its status goes over vsock.
fn serve_host() -> Result<i32, String> {
    // Their files go before they are loaded.
    let later = system::OpenModules::open(Path::new(LATER_LIST));
    let (loaded, all_loaded) = mpsc::channel::<()>();
    let _ = std::thread::Builder::new().spawn(|| {
        std::thread::sleep(SETTLED);
        system::give_way();
        complain(later.load());
        drop(loaded);
        power_button::watch();
    });
    // The channel closes when all modules are there, or when there is no such thread.
    let settle = || {
        let _ = all_loaded.recv();
    };
    agent::run(settle)?;
    // The host has heard the status over vsock. In a restored machine a port that was granted to
    // a program need not be open: KVM saves a task register as busy, for which QEMU's emulation
    // of AMD's SVM lets no program write to ports.
    system::power_off()
}

/// Loads what nobody waits for, and nobody dies without.
fn load_later() {
    complain(system::load_modules(Path::new(LATER_LIST)));
}

fn complain(result: Result<(), String>) {
    if let Err(error) = result {
        eprintln!("mayfly-init: {error}");
    }
}
