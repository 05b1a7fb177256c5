//! Writes man pages and shell completions to a folder, from the same definition
//! that parses the command line. They are no part of the monitor itself.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, ValueEnum};
use clap_complete::Shell;
use mayfly::cli::Cli;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: mayfly-generate FOLDER");
        return ExitCode::from(2);
    };
    match generate(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mayfly-generate: {}: {error}", folder.display());
            ExitCode::FAILURE
        }
    }
}

fn generate(folder: &PathBuf) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let command = Cli::command().disable_help_subcommand(true);
    clap_mangen::generate_to(command.clone(), folder)?;
    for &shell in Shell::value_variants() {
        clap_complete::generate_to(shell, &mut command.clone(), "mayfly", folder)?;
    }
    Ok(())
}
