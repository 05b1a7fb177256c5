//! The steady state: what CPU, system calls, page faults, files and TCP cost.
//!
//! Each is done again and again for a while, in five rounds; the median counts. A while is
//! long beside what the clock and the scheduler do, on slow machines and on fast ones; only
//! a step of it (a file, some pages) has a fixed size.

#![allow(unsafe_code, reason = "system calls are what is measured")]

use std::fs::{self, OpenOptions};
use std::hint::black_box;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use mayfly_protocol::peer::Meeting;
use mayfly_protocol::steady::{Figure, Steady};

use super::repeat::{MIB, ROUNDS, WHILE, nanoseconds, repeated};
use super::tcp;

/// A step of the CPU's loop, and what is read and written at once.
const STEPS: u64 = 100_000;
const BLOCK: usize = 256 << 10;
const FILE_SIZE: usize = 8 << 20;
const PAGES: usize = 2048;
const PAGE_SIZE: usize = 4096;

/// Takes all figures, and returns them as a JSON object. Words: `root=DIR` is a directory of the root's
/// file system, if not `/`; `volume=DIR` also measures files there; `tcp=…` also measures TCP
/// (see `mayfly_protocol::peer`).
pub fn measure(words: &[String]) -> String {
    let mut figures: Vec<Figure> = [
        Figure::of("cpu", "ns", rounds(cpu)),
        Figure::of("syscall", "ns", rounds(system_call)),
        Figure::of("fault", "ns", rounds(page_fault)),
    ]
    .into_iter()
    .flatten()
    .collect();
    // A directory that can't be written to has no figures.
    let mut files = |prefix: &str, directory: &Path| {
        let path = directory.join(".mayfly-trial");
        if let Ok((writes, reads)) = file_rates(&path) {
            figures.extend(Figure::of(&format!("{prefix}_write"), "MiB/s", writes));
            figures.extend(Figure::of(&format!("{prefix}_read"), "MiB/s", reads));
        }
    };
    let word = |name: &str| words.iter().find_map(|word| word.strip_prefix(name));
    files("root", Path::new(word("root=").unwrap_or("/")));
    if let Some(directory) = word("volume=") {
        files("volume", Path::new(directory));
    }
    let meeting: Option<Meeting> = words.iter().find_map(|word| word.parse().ok());
    let tcp = meeting.map(|meeting| {
        let (more, way) = tcp::measure(&meeting);
        figures.extend(more);
        way
    });
    serde_json::to_string(&Steady { figures, tcp }).unwrap_or_default()
}

fn rounds(once: impl FnMut() -> f64) -> Vec<f64> {
    std::iter::repeat_with(once).take(ROUNDS).collect()
}

/// Nanoseconds for 100 000 steps of a random number generator.
fn cpu() -> f64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let (count, time) = repeated(|| {
        for _ in 0..STEPS {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        black_box(state);
    });
    nanoseconds(count, time)
}

/// Nanoseconds for the cheapest system call, there and back.
fn system_call() -> f64 {
    const CALLS: u32 = 100;
    let (count, time) = repeated(|| {
        for _ in 0..CALLS {
            // SAFETY: takes nothing, changes nothing.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
    });
    nanoseconds(count * f64::from(CALLS), time)
}

/// Nanoseconds for the first write to a page.
fn page_fault() -> f64 {
    let mut spent = Duration::ZERO;
    let mut faults = 0.0;
    while spent < WHILE {
        let len = PAGES * PAGE_SIZE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, wherever there is room.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if memory == libc::MAP_FAILED {
            return f64::NAN;
        }
        // SAFETY: of the mapping just made, which nothing else uses. Huge pages would
        // make one fault of many.
        unsafe { libc::madvise(memory, len, libc::MADV_NOHUGEPAGE) };
        let start = Instant::now();
        for page in 0..PAGES {
            // SAFETY: within the mapping, which is writable.
            unsafe { memory.cast::<u8>().add(page * PAGE_SIZE).write_volatile(1) };
        }
        spent += start.elapsed();
        faults += PAGES as f64;
        // SAFETY: of the mapping, which nothing refers to any more.
        unsafe { libc::munmap(memory, len) };
    }
    nanoseconds(faults, spent)
}

/// MiB a second, in rounds: written and synced, and read with an empty page cache, as far as
/// the file system has one beneath.
fn file_rates(path: &Path) -> io::Result<(Vec<f64>, Vec<f64>)> {
    let mut block = vec![0x5a_u8; BLOCK];
    let (mut writes, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (mut writing, mut reading) = (Duration::ZERO, Duration::ZERO);
        let (mut written, mut read) = (0.0, 0.0);
        while writing.min(reading) < WHILE {
            // Never what an image or another instance has put there: it may be a link.
            let mut how = OpenOptions::new();
            let mut file = how.read(true).write(true).create_new(true).open(path)?;
            let start = Instant::now();
            for _ in 0..FILE_SIZE / BLOCK {
                file.write_all(&block)?;
            }
            file.sync_data()?;
            writing += start.elapsed();
            written += FILE_SIZE as f64 / MIB;
            // Most often it is read faster than it is written.
            while reading < writing.min(WHILE) {
                file.rewind()?;
                // SAFETY: an open descriptor; the call is advice.
                unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
                let start = Instant::now();
                while file.read(&mut block)? > 0 {}
                reading += start.elapsed();
                read += FILE_SIZE as f64 / MIB;
            }
            fs::remove_file(path)?;
        }
        writes.push(written / writing.as_secs_f64());
        reads.push(read / reading.as_secs_f64());
    }
    Ok((writes, reads))
}
