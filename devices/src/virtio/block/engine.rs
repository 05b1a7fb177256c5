//! Doing I/O without blocking: by io_uring, or by threads where it is refused.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use io_uring::{IoUring, opcode, types};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How many operations may be in flight.
pub const DEPTH: usize = 256;
const THREADS: usize = 4;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads to the buffers.
    Read,
    /// Writes from the buffers; durable at its end if so asked.
    Write { durable: bool },
    /// Makes what was written durable.
    Flush,
    /// `fallocate` with a mode.
    Allocate { mode: libc::c_int, len: u64 },
}

/// An operation. Its owner keeps it, unmoved, and what its buffers point to,
/// until it is completed.
#[derive(Debug)]
pub struct Operation {
    /// What to do.
    pub kind: Kind,
    /// Where in the file.
    pub offset: u64,
    /// The buffers of a read or write.
    pub iovecs: Vec<libc::iovec>,
}

/// A completed operation: its token, and how many bytes or which error.
pub type Completion = (u64, io::Result<usize>);

/// Does I/O on one file.
pub enum Engine {
    /// By the kernel.
    Uring(Box<Uring>),
    /// By threads.
    Threads(Threads),
}

impl Engine {
    /// io_uring if this host allows it, else threads.
    pub fn new(file: File) -> io::Result<Self> {
        match Uring::new(file.try_clone()?) {
            Ok(uring) => Ok(Engine::Uring(Box::new(uring))),
            Err(error) => {
                log::info!("io_uring is not available ({error}); using threads");
                Engine::threads(file)
            }
        }
    }

    /// Threads, whatever the host allows.
    pub fn threads(file: File) -> io::Result<Self> {
        Threads::new(Arc::new(file)).map(Engine::Threads)
    }

    /// Starts an operation.
    ///
    /// # Safety
    ///
    /// The buffers must stay valid until the operation is completed.
    pub unsafe fn submit(&mut self, token: u64, operation: &Operation) -> io::Result<()> {
        match self {
            // SAFETY: the caller's promise.
            Engine::Uring(uring) => unsafe { uring.submit(token, operation) },
            Engine::Threads(threads) => threads.submit(token, operation),
        }
    }

    /// Makes sure that what was submitted is under way.
    pub fn commit(&mut self) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => retry(|| uring.ring.submit().map(drop)),
            Engine::Threads(_) => Ok(()),
        }
    }

    /// Takes what is completed.
    pub fn completions(&mut self) -> Vec<Completion> {
        match self {
            Engine::Uring(uring) => uring.completions(),
            Engine::Threads(threads) => threads.completions(),
        }
    }

    /// Waits until something is completed. Something must be in flight.
    pub fn wait(&mut self) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => retry(|| uring.ring.submit_and_wait(1).map(drop)),
            Engine::Threads(threads) => threads.wait(),
        }
    }

    /// Readable when something is completed.
    pub fn event(&self) -> RawFd {
        match self {
            Engine::Uring(uring) => uring.event.as_raw_fd(),
            Engine::Threads(threads) => threads.event.as_raw_fd(),
        }
    }
}

fn retry(mut operation: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// I/O by io_uring.
pub struct Uring {
    ring: IoUring,
    file: File,
    event: EventFd,
}

impl Uring {
    fn new(file: File) -> io::Result<Self> {
        let ring = IoUring::new(DEPTH as u32)?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Uring { ring, file, event })
    }

    unsafe fn submit(&mut self, token: u64, operation: &Operation) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        let (iovecs, count) = (operation.iovecs.as_ptr(), operation.iovecs.len() as u32);
        let entry = match operation.kind {
            Kind::Read => opcode::Readv::new(fd, iovecs, count)
                .offset(operation.offset)
                .build(),
            Kind::Write { durable } => opcode::Writev::new(fd, iovecs, count)
                .offset(operation.offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            Kind::Flush => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Kind::Allocate { mode, len } => opcode::Fallocate::new(fd, len)
                .offset(operation.offset)
                .mode(mode)
                .build(),
        };
        // SAFETY: the caller keeps the buffers valid until the completion.
        unsafe { self.ring.submission().push(&entry.user_data(token)) }
            .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))
    }

    fn completions(&mut self) -> Vec<Completion> {
        let _ = self.event.read();
        let result =
            |value: i32| usize::try_from(value).map_err(|_| io::Error::from_raw_os_error(-value));
        self.ring
            .completion()
            .map(|entry| (entry.user_data(), result(entry.result())))
            .collect()
    }
}

/// I/O by threads.
pub struct Threads {
    jobs: Option<Sender<Job>>,
    done: Receiver<Completion>,
    event: EventFd,
    threads: Vec<JoinHandle<()>>,
}

struct Job {
    token: u64,
    kind: Kind,
    offset: u64,
    iovecs: *const libc::iovec,
    count: libc::c_int,
}

// SAFETY: whoever submits keeps what it points to valid until the completion,
// whichever thread it is used on.
unsafe impl Send for Job {}

impl Threads {
    fn new(file: Arc<File>) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (finished, done) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let event = EventFd::new(EFD_NONBLOCK)?;
        let mut threads = Vec::new();
        for _ in 0..THREADS {
            let (queue, finished, file) = (queue.clone(), finished.clone(), file.clone());
            let event = event.try_clone()?;
            let work = move || {
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { return };
                    let result = job.run(&file);
                    if finished.send((job.token, result)).is_err() {
                        return;
                    }
                    let _ = event.write(1);
                }
            };
            threads.push(thread::Builder::new().name("block".into()).spawn(work)?);
        }
        Ok(Threads {
            jobs: Some(jobs),
            done,
            event,
            threads,
        })
    }

    fn submit(&mut self, token: u64, operation: &Operation) -> io::Result<()> {
        let job = Job {
            token,
            kind: operation.kind,
            offset: operation.offset,
            iovecs: operation.iovecs.as_ptr(),
            count: operation.iovecs.len() as libc::c_int,
        };
        let jobs = self.jobs.as_ref();
        jobs.and_then(|jobs| jobs.send(job).ok())
            .ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    fn completions(&mut self) -> Vec<Completion> {
        let _ = self.event.read();
        self.done.try_iter().collect()
    }

    fn wait(&self) -> io::Result<()> {
        let mut entry = libc::pollfd {
            fd: self.event.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        retry(|| {
            // SAFETY: one live entry.
            match unsafe { libc::poll(&mut entry, 1, -1) } {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        })
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Job {
    fn run(&self, file: &File) -> io::Result<usize> {
        let fd = file.as_raw_fd();
        let offset = libc::off_t::try_from(self.offset).map_err(io::Error::other)?;
        let (iovecs, count) = (self.iovecs, self.count);
        let result = match self.kind {
            // SAFETY: the buffers are valid, as said of `Job`.
            Kind::Read => unsafe { libc::preadv(fd, iovecs, count, offset) },
            Kind::Write { durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                // SAFETY: the buffers are valid, as said of `Job`.
                unsafe { libc::pwritev2(fd, iovecs, count, offset, flags) }
            }
            // SAFETY: no memory is involved.
            Kind::Flush => unsafe { libc::fdatasync(fd) as isize },
            Kind::Allocate { mode, len } => {
                let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
                // SAFETY: no memory is involved.
                unsafe { libc::fallocate(fd, mode, offset, len) as isize }
            }
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}
