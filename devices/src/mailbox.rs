//! A mailbox in which threads leave values for another, which an event descriptor wakes.

use std::sync::{Arc, Mutex};

use crate::bus::lock;

/// Values that wait to be taken. The standard library's channels yield the CPU when
/// threads meet in them, which is a system call that confined threads do not have.
#[derive(Debug)]
pub struct Mailbox<T>(Arc<Mutex<Vec<T>>>);

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Mailbox(Arc::default())
    }
}

impl<T> Clone for Mailbox<T> {
    /// Another end of the same.
    fn clone(&self) -> Self {
        Mailbox(self.0.clone())
    }
}

impl<T> Mailbox<T> {
    /// Leaves a value.
    pub fn put(&self, value: T) {
        lock(&self.0).push(value);
    }

    /// Takes what there is, the oldest first.
    pub fn take(&self) -> Vec<T> {
        std::mem::take(&mut *lock(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn nothing_is_lost_and_each_has_its_order() {
        const COUNT: usize = 10_000;
        let mailbox = Mailbox::default();
        let threads = [0, 1, 2, 3].map(|thread| {
            let mailbox = mailbox.clone();
            thread::spawn(move || (0..COUNT).for_each(|number| mailbox.put((thread, number))))
        });
        let mut next = [0; 4];
        while next != [COUNT; 4] {
            for (thread, number) in mailbox.take() {
                assert_eq!(next[thread], number);
                next[thread] += 1;
            }
        }
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        assert!(mailbox.take().is_empty());
    }
}
