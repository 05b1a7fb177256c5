//! The VMM's own ports (see `boot/src/layout.rs`).

#![allow(unsafe_code, reason = "the VMM's ports")]

/// A write here marks the moment at which init was reached.
const BOOT_MARK: u16 = 0xb04;
const BOOT_MARK_VALUE: u8 = 0x4d;
/// A write here tells init's exit status.
const GUEST_STATUS: u16 = 0xb05;

/// Bytes that are written here make up the mailbox's address.
const SNAPSHOT_MAILBOX: u16 = 0xb08;
/// A write here says that the machine may be saved.
const SNAPSHOT_POINT: u16 = 0xb09;

/// Tells the VMM that init was reached.
pub fn mark_boot() {
    write(BOOT_MARK, BOOT_MARK_VALUE);
}

/// Tells the VMM how the guest's work ended.
pub fn report_status(status: u8) {
    write(GUEST_STATUS, status);
}

/// Tells the VMM where the mailbox is, and that the machine may be saved. Whoever makes it go
/// on has put something into the mailbox when this returns.
pub fn snapshot_point(mailbox: u64) {
    for byte in mailbox.to_le_bytes() {
        write(SNAPSHOT_MAILBOX, byte);
    }
    write(SNAPSHOT_POINT, 1);
}

fn write(port: u16, value: u8) {
    // SAFETY: ioperm changes nothing but this thread's port permissions.
    if unsafe { libc::ioperm(port.into(), 1, 1) } != 0 {
        return; // not PID 1 of a guest
    }
    // SAFETY: the port was granted above. Of memory it changes the mailbox alone, which is
    // mapped for that.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value,
            options(nostack, preserves_flags));
    }
    // Processes would inherit it, and could tell lies.
    // SAFETY: ioperm changes nothing but this thread's port permissions.
    unsafe { libc::ioperm(port.into(), 1, 0) };
}
