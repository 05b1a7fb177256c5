//! Threads confine themselves before the guest runs.

use std::io;

use mayfly_devices::virtio::block::Prepare;

use mayfly_sandbox::Role;

/// Threads of disks start before the sandbox is closed, and wait for that.
pub struct ConfinedStart(pub mayfly_sandbox::ConfinementBarrier);

impl Prepare for ConfinedStart {
    fn first(&self) -> Box<dyn FnOnce() + Send> {
        let place = self.0.pending();
        Box::new(move || confined(place.confine(Role::Io)))
    }

    fn give_up(&self) {
        self.0.give_up();
    }
}

/// A thread that is not confined must not go on.
pub fn confined(result: io::Result<()>) {
    if let Err(error) = result {
        log::error!("confining a thread: {error}");
        std::process::exit(mayfly_sandbox::PANIC.into());
    }
}
