//! `mayfly logs`: what a VM's command wrote.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use crate::failure::{Failure, OrFail};
use crate::run::log::{Item, Piece, Reader, Stamps, Tail};
use crate::run::record::{State, VmDir};

/// How often a log is looked at that is followed.
const INTERVAL: Duration = Duration::from_millis(100);

/// Prints a VM's log; a line on standard error says what is missing in it.
pub fn print(
    vm_dir: &VmDir,
    follow: bool,
    tail: Option<usize>,
    timestamps: bool,
) -> Result<(), Failure> {
    let (name, path) = (vm_dir.name(), vm_dir.log());
    let mut reader = Reader::open(&path, follow).or_host(path.display())?;
    let mut tail = tail.map(Tail::new);
    let mut stamps = timestamps.then(Stamps::default);
    let mut print = |item: Item| match item {
        Item::Piece(piece) => show(piece, &mut stamps),
        Item::Missing(bytes) => {
            io::stdout().flush()?;
            writeln!(
                io::stderr(),
                "mayfly: {name}: {bytes} bytes of output are missing here: the log keeps the last \
                 ones (run --log-size)"
            )
        }
    };
    loop {
        // Asked before: what is written until it ends must not be missed.
        let running = vm_dir.state() == State::Running;
        while let Some(item) = reader.item().or_host(path.display())? {
            match (&mut tail, item) {
                (Some(tail), Item::Piece(piece)) => tail.push(piece),
                // What comes before the last lines is not asked for.
                (Some(_), Item::Missing(_)) => {}
                (None, item) => match print(item) {
                    Ok(()) => {}
                    Err(error) => return lost(error),
                },
            }
        }
        // What comes later is printed as it comes.
        let lines = tail.take().into_iter().flat_map(Tail::into_lines);
        for line in lines {
            if let Err(error) = print(Item::Piece(line)) {
                return lost(error);
            }
        }
        if let Err(error) = io::stdout().flush() {
            return lost(error);
        }
        if !follow || !running {
            break;
        }
        thread::sleep(INTERVAL);
    }
    for problem in vm_dir.problems() {
        if problem.starts_with("log:") {
            let _ = writeln!(io::stderr(), "mayfly: {}: {problem}", vm_dir.name());
        }
    }
    Ok(())
}

/// Output that cannot be written; whoever read it may have seen enough.
fn lost(error: io::Error) -> Result<(), Failure> {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error).or_host("standard output"),
    }
}

fn show(piece: Piece, stamps: &mut Option<Stamps>) -> io::Result<()> {
    let data = match stamps {
        Some(stamps) => stamps.put(&piece),
        None => piece.data,
    };
    match piece.stream {
        2 => io::stderr().write_all(&data),
        _ => io::stdout().write_all(&data),
    }
}
