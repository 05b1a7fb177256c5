//! I/O by threads that may block.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::inline::Inline;
use super::operation::{Completion, Kind, Operation, retry};
use crate::mailbox::Mailbox;
use crate::poll::{entry, poll};

const THREADS: usize = 4;

/// Does one operation after the other, on several threads at once.
pub trait Worker: Send + Sync + 'static {
    /// Does it, and returns how many bytes of the buffers were read or written.
    ///
    /// # Safety
    ///
    /// The buffers must be valid, and may be written to by others meanwhile.
    unsafe fn run(
        &self,
        kind: Kind,
        offset: u64,
        iovecs: *const libc::iovec,
        count: usize,
    ) -> io::Result<usize>;

    /// Reads or writes at once, without waiting for anything; none if that cannot be, and
    /// [`Worker::run`] is to do it.
    ///
    /// # Safety
    ///
    /// As of [`Worker::run`].
    unsafe fn try_at_once(
        &self,
        _kind: Kind,
        _offset: u64,
        _iovecs: &[libc::iovec],
    ) -> Option<io::Result<usize>> {
        None
    }

    /// There is nothing more to do. Comes from the last thread, which may do I/O.
    fn close(&self) {}
}

/// What the threads of a disk do before their first job.
pub trait Prepare: Send + Sync {
    /// Called before each thread is started; what it returns is what the thread does first.
    fn first(&self) -> Box<dyn FnOnce() + Send>;

    /// The threads are about to be waited for: what they do first must not last any longer.
    fn give_up(&self) {}
}

/// Threads that have nothing to do first.
struct Unprepared;

impl Prepare for Unprepared {
    fn first(&self) -> Box<dyn FnOnce() + Send> {
        Box::new(|| {})
    }
}

/// Nothing.
pub fn unprepared() -> Arc<dyn Prepare> {
    Arc::new(Unprepared)
}

/// The threads, and what they are told and tell.
pub struct Threads {
    worker: Arc<dyn Worker>,
    inline: Inline,
    jobs: Arc<Jobs>,
    done: Mailbox<Completion>,
    event: EventFd,
    threads: Vec<JoinHandle<()>>,
    prepare: Arc<dyn Prepare>,
}

struct Job {
    token: u64,
    kind: Kind,
    offset: u64,
    iovecs: *const libc::iovec,
    count: usize,
}

/// What is to be done. Each job wakes one thread, and only if one sleeps; those
/// that are awake take the next by themselves.
#[derive(Default)]
struct Jobs {
    queue: Mutex<Queue>,
    more: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    asleep: usize,
    /// Threads that have not ended.
    alive: usize,
    over: bool,
}

impl Jobs {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, job: Job) {
        let mut queue = self.queue();
        queue.jobs.push_back(job);
        let wake = queue.asleep > 0;
        drop(queue);
        if wake {
            self.more.notify_one();
        }
    }

    /// The next one, when there is one; none when it is all over.
    fn next(&self) -> Option<Job> {
        let mut queue = self.queue();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.over {
                return None;
            }
            queue.asleep += 1;
            queue = self
                .more
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
            queue.asleep -= 1;
        }
    }

    /// A thread ends; true if it is the last.
    fn leave(&self) -> bool {
        let mut queue = self.queue();
        queue.alive -= 1;
        queue.alive == 0
    }

    fn end(&self) {
        self.queue().over = true;
        self.more.notify_all();
    }
}

// SAFETY: whoever submits keeps what it points to valid until the completion,
// whichever thread it is used on.
unsafe impl Send for Job {}

impl Threads {
    pub(super) fn new(worker: Arc<impl Worker>, prepare: &Arc<dyn Prepare>) -> io::Result<Self> {
        Threads::signalling(&EventFd::new(EFD_NONBLOCK)?, THREADS, worker, prepare)
    }

    /// A number of threads, which signal an event that others may signal, too.
    pub(super) fn signalling(
        event: &EventFd,
        count: usize,
        worker: Arc<impl Worker>,
        prepare: &Arc<dyn Prepare>,
    ) -> io::Result<Self> {
        let jobs = Arc::new(Jobs::default());
        let done = Mailbox::default();
        // Whole from the start: should a thread be refused, its end ends the others.
        let mut threads = Threads {
            worker: worker.clone(),
            inline: Inline::default(),
            jobs: jobs.clone(),
            done: done.clone(),
            event: event.try_clone()?,
            threads: Vec::new(),
            prepare: prepare.clone(),
        };
        for _ in 0..count {
            let (its_jobs, done, its_worker) = (jobs.clone(), done.clone(), worker.clone());
            let event = threads.event.try_clone()?;
            let first = prepare.first();
            jobs.queue().alive += 1;
            let work = move || {
                first();
                while let Some(job) = its_jobs.next() {
                    // SAFETY: whoever submitted keeps the buffers valid.
                    let result =
                        unsafe { its_worker.run(job.kind, job.offset, job.iovecs, job.count) };
                    done.put((job.token, result));
                    let _ = event.write(1);
                }
                if its_jobs.leave() {
                    its_worker.close();
                }
            };
            match thread::Builder::new().name("block".into()).spawn(work) {
                Ok(thread) => threads.threads.push(thread),
                Err(error) => {
                    if jobs.leave() {
                        worker.close();
                    }
                    return Err(error);
                }
            }
        }
        Ok(threads)
    }

    /// A turn of the device begins.
    pub(super) fn begin(&mut self) {
        self.inline.begin();
    }

    /// Does an operation at once, if it is one for that.
    ///
    /// # Safety
    ///
    /// The operation's buffers must be valid.
    pub(super) unsafe fn try_at_once(
        &mut self,
        operation: &Operation,
    ) -> Option<io::Result<usize>> {
        let Operation {
            kind,
            offset,
            iovecs,
        } = operation;
        let worker = &self.worker;
        // SAFETY: the caller's promise.
        let transfer = || unsafe { worker.try_at_once(*kind, *offset, iovecs) };
        self.inline.run(operation, transfer)
    }

    /// # Safety
    ///
    /// The buffers must stay valid until the operation is completed.
    pub(super) unsafe fn submit(&mut self, token: u64, operation: &Operation) {
        self.jobs.add(Job {
            token,
            kind: operation.kind,
            offset: operation.offset,
            iovecs: operation.iovecs.as_ptr(),
            count: operation.iovecs.len(),
        });
    }

    pub(super) fn completions(&mut self) -> Vec<Completion> {
        let _ = self.event.read();
        self.done.take()
    }

    pub(super) fn wait(&self) -> io::Result<()> {
        retry(|| poll(&mut [entry(self.event.as_raw_fd(), libc::POLLIN)], -1).map(drop))
    }

    pub(super) fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.jobs.end();
        self.prepare.give_up();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A raw image.
impl Worker for File {
    unsafe fn run(
        &self,
        kind: Kind,
        offset: u64,
        iovecs: *const libc::iovec,
        count: usize,
    ) -> io::Result<usize> {
        let fd = self.as_raw_fd();
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let count = libc::c_int::try_from(count).map_err(io::Error::other)?;
        let result = match (kind, kind.allocation()) {
            (_, Some((mode, len))) => {
                let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
                // SAFETY: no memory is involved.
                unsafe { libc::fallocate(fd, mode, offset, len) as isize }
            }
            // SAFETY: the caller's promise.
            (Kind::Read, _) => unsafe { libc::preadv(fd, iovecs, count, offset) },
            (Kind::Write { durable }, _) => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                // SAFETY: the caller's promise.
                unsafe { libc::pwritev2(fd, iovecs, count, offset, flags) }
            }
            // SAFETY: no memory is involved.
            _ => unsafe { libc::fdatasync(fd) as isize },
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}
