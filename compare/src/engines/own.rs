//! A program of the user's, that runs the command in whatever way.
//!
//! It is called as `PROGRAM ROOT COMMAND…`: the image's files, and the command as it is in
//! them. It passes on what the command prints, and ends with its status. On the descriptor
//! in `MAYFLY_MARKS` it may write lines: a mark (`launched`, `built`, `kernel`, `init`) and,
//! if that is not now, its time in nanoseconds of `CLOCK_MONOTONIC`; or `note TEXT`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use super::engine::{About, Engine, Job, Place};
use crate::error::{Context, Error};
use crate::instance::{Launch, Sign};
use crate::peer::Origin;

pub struct Own {
    pub program: PathBuf,
}

impl Engine for Own {
    fn about(&self) -> About {
        About {
            version: None,
            network: "unknown".into(),
            notes: vec!["a program of the user's".into()],
        }
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error> {
        let (read, write) = io::pipe().or_host("a pipe")?;
        let write = OwnedFd::from(write);
        let root = place.root.clone().into_os_string();
        let words = job.command().into_iter().map(Into::into);
        Ok(Launch {
            command: [self.program.clone().into_os_string(), root]
                .into_iter()
                .chain(words)
                .collect(),
            env: vec![("MAYFLY_MARKS".into(), write.as_raw_fd().to_string().into())],
            nonce: job.nonce.clone(),
            signs: vec![Sign::Lines(read.into())],
            inherited: vec![write],
            ..Launch::default()
        })
    }

    /// Who knows?
    fn origin(&self) -> Origin {
        Origin::Anywhere
    }

    fn has_volumes(&self) -> bool {
        false
    }
}
