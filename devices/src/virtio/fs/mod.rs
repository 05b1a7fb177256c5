//! The file system device (virtio 1.2, 5.11): a folder of the host's. Another
//! process, the backend, moves the bytes: it maps the guest's memory, and runs the
//! queues by itself. The device introduces the two to each other.

mod frontend;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::frontend::{BackendError, Frontend};

use super::GuestMemory;
use super::device::{DeviceId, NeedsReset, Token, VirtioDevice};
use super::mmio::FEATURES;
use super::queues::{Queues, Ring};
use super::state::{DeviceState, RestoreError, SaveError};

/// Urgent requests, which are those to forget, and all others.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
const TAG_LEN: usize = 36;
/// A tag, and the number of queues for requests.
const CONFIG_LEN: usize = TAG_LEN + size_of::<u32>();
const REQUEST_QUEUES: u32 = 1;
/// The backend's socket was closed. Tokens below are of queues.
const HUNG_UP: Token = 2;
const _: () = assert!(HUNG_UP as usize == QUEUE_SIZES.len());
/// What the guest waits for at most when it starts or resets the device.
const BACKEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Ends a backend, without its help.
pub type End = Box<dyn FnMut() + Send>;

/// The device.
pub struct Fs {
    /// None after it failed: it does not come back.
    backend: Option<Frontend>,
    end: End,
    config: [u8; CONFIG_LEN],
    features: u64,
    /// For each queue, what the backend signals when it has used chains: the guest
    /// must be told why it is interrupted, which the transport does.
    calls: [EventFd; QUEUE_SIZES.len()],
    hung_up: Epoll,
    /// The queues that the backend has.
    running: Vec<u32>,
}

impl Fs {
    /// A device that the guest finds by its tag, which has at most 36 bytes. `end`
    /// is called when the backend failed, and must see to it that it touches no
    /// memory any more.
    pub fn new(backend: Frontend, tag: &str, end: End) -> io::Result<Self> {
        let mut config = [0; CONFIG_LEN];
        let (name, queues) = config.split_at_mut(TAG_LEN);
        name.get_mut(..tag.len())
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(tag.as_bytes());
        queues.copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        // Its answers must not wake anybody up, only its end.
        let hung_up = Epoll::new()?;
        hung_up.ctl(
            ControlOperation::Add,
            backend.socket().as_raw_fd(),
            EpollEvent::new(EventSet::READ_HANG_UP, 0),
        )?;
        Ok(Fs {
            features: backend.features() & FEATURES,
            backend: Some(backend),
            end,
            config,
            calls: [EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?],
            hung_up,
            running: Vec::new(),
        })
    }

    /// Lets the backend do something, and ends it if it fails.
    fn with_backend(
        &mut self,
        work: impl FnOnce(&mut Frontend) -> Result<(), BackendError>,
    ) -> Result<(), NeedsReset> {
        let Some(backend) = &mut self.backend else {
            return Err(NeedsReset("the backend has ended"));
        };
        backend.give_time(BACKEND_TIMEOUT);
        work(backend).map_err(|error| self.fail(error))
    }

    fn fail(&mut self, error: BackendError) -> NeedsReset {
        if let Some(backend) = self.backend.take() {
            drop(backend);
            (self.end)();
        }
        self.running.clear();
        NeedsReset(match error {
            BackendError::Ended => "the backend has ended",
            // Nobody interrupts it once it has been greeted.
            BackendError::Silent | BackendError::Interrupted => "the backend does not answer",
            BackendError::Nonsense => "the backend does not keep to vhost-user",
            BackendError::Refused => "the backend refused what it was told",
            BackendError::Unfit => "the backend is not fit for it",
            BackendError::Private => "guest memory is not shared",
        })
    }
}

impl VirtioDevice for Fs {
    fn id(&self) -> DeviceId {
        DeviceId::Fs
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn is_vhost_user(&self) -> bool {
        true
    }

    fn activate(&mut self, acked: u64, memory: &Arc<GuestMemory>) -> Result<(), NeedsReset> {
        self.with_backend(|backend| backend.set_up(acked, memory))
    }

    fn start_backend(&mut self, rings: &[Option<Ring>]) -> Result<(), NeedsReset> {
        let calls = self.calls.each_ref().map(EventFd::as_raw_fd);
        for ((index, ring), call) in (0..).zip(rings).zip(calls) {
            if let Some(ring) = ring {
                // It may have begun, whatever it says.
                self.running.push(index);
                self.with_backend(|backend| backend.start(index, ring, call))?;
            }
        }
        Ok(())
    }

    fn process_queue(&mut self, _: usize, _: &mut Queues) -> Result<(), NeedsReset> {
        Ok(())
    }

    fn sources(&self) -> Vec<(Token, RawFd)> {
        let calls = (0..).zip(self.calls.iter().map(EventFd::as_raw_fd));
        calls.chain([(HUNG_UP, self.hung_up.as_raw_fd())]).collect()
    }

    fn handle_event(&mut self, token: Token, queues: &mut Queues) -> Result<(), NeedsReset> {
        match self.calls.get(token as usize) {
            Some(call) => {
                let _ = call.read();
                queues.interrupt();
                Ok(())
            }
            None if self.backend.is_some() => Err(self.fail(BackendError::Ended)),
            None => Ok(()),
        }
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Err(SaveError {
            device: DeviceId::Fs,
            reason: "its backend is another process, which has a state of its own",
        })
    }

    fn restore(&mut self, _: DeviceState) -> Result<(), RestoreError> {
        Err(RestoreError::Kind(DeviceId::Fs))
    }

    fn reset(&mut self) {
        for index in std::mem::take(&mut self.running) {
            // One that does not stop is ended, which stops it, too.
            if let Err(broken) = self.with_backend(|backend| backend.stop(index)) {
                log::warn!("{:?} device: {broken}", self.id());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
