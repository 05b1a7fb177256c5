//! Mailboxes that a guest made up.
#![no_main]

use mayfly_fuzz::snapshot;

libfuzzer_sys::fuzz_target!(|mailbox: (u64, Vec<u64>, Vec<u8>)| {
    let (address, numbers, frames) = mailbox;
    snapshot::mailbox(address, &numbers, frames);
});
