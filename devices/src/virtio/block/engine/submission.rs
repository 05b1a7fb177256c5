//! An image with what does its I/O.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::image::Image;
use super::operation::{Completion, Operation, Submitted};
use super::threads::{Prepare, Threads};
use super::uring::Uring;

/// Does I/O on one image.
pub enum Engine {
    /// By the kernel.
    Uring(Box<Uring>),
    /// By threads.
    Threads(Threads),
}

impl Engine {
    /// What suits the image and this host best.
    pub fn new(image: Image, prepare: &Arc<dyn Prepare>) -> io::Result<Self> {
        let file = match image {
            Image::Raw(file) => file,
            Image::Qcow2(_) | Image::Concat(_) => return Engine::threads(image, prepare),
        };
        match Uring::new(file.try_clone()?, prepare) {
            Ok(uring) => Ok(Engine::Uring(Box::new(uring))),
            Err(error) => {
                log::info!("io_uring is not available ({error}); using threads");
                Engine::threads(Image::Raw(file), prepare)
            }
        }
    }

    /// Threads, whatever the host allows.
    pub fn threads(image: Image, prepare: &Arc<dyn Prepare>) -> io::Result<Self> {
        let threads = match image {
            Image::Raw(file) => Threads::new(Arc::new(file), prepare),
            Image::Qcow2(qcow2) => Threads::new(Arc::new(*qcow2), prepare),
            Image::Concat(parts) => Threads::new(Arc::new(parts), prepare),
        };
        threads.map(Engine::Threads)
    }

    /// A turn of the device begins.
    pub fn begin(&mut self) {
        match self {
            Engine::Uring(uring) => uring.begin(),
            Engine::Threads(threads) => threads.begin(),
        }
    }

    /// Starts an operation, or does it at once.
    ///
    /// # Safety
    ///
    /// The buffers must stay valid until the operation is completed.
    pub unsafe fn submit(&mut self, token: u64, operation: &Operation) -> io::Result<Submitted> {
        match self {
            // SAFETY: the caller's promise.
            Engine::Uring(uring) => unsafe { uring.submit(token, operation) },
            Engine::Threads(threads) => {
                // SAFETY: the caller's promise.
                if let Some(moved) = unsafe { threads.try_at_once(operation) } {
                    return Ok(Submitted::Done(moved));
                }
                // SAFETY: the caller's promise.
                unsafe { threads.submit(token, operation) };
                Ok(Submitted::Started)
            }
        }
    }

    /// Makes sure that what was submitted is under way.
    pub fn commit(&mut self) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => uring.commit(),
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
            Engine::Uring(uring) => uring.wait(),
            Engine::Threads(threads) => threads.wait(),
        }
    }

    /// Signalled when something is completed: to be watched on edges.
    pub fn event(&self) -> RawFd {
        match self {
            Engine::Uring(uring) => uring.event(),
            Engine::Threads(threads) => threads.event(),
        }
    }
}
