//! Users, groups and capabilities. The kernel keeps them for each thread, and glibc would
//! change those of all: these are its system calls, for the calling thread alone.

#![allow(unsafe_code, reason = "the process changes who it is")]

use std::io;

use serde::{Deserialize, Serialize};

/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// The number of capabilities in the two words of that version.
const CAPABILITIES: libc::c_int = 64;

/// `linux/securebits.h`: each bit, and the one that locks it.
const NOROOT: libc::c_int = 0b11;
const NO_SETUID_FIXUP: libc::c_int = 0b1 << 2;
const NO_SETUID_FIXUP_LOCKED: libc::c_int = 0b1 << 3;
const KEEP_CAPS_LOCKED: libc::c_int = 0b1 << 5;
const NO_CAP_AMBIENT_RAISE: libc::c_int = 0b11 << 6;

/// A user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Ids {
    /// The thread's effective ones.
    pub fn current() -> Self {
        // SAFETY: touches no memory.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        Ids { uid, gid }
    }

    /// Those of a number.
    pub fn of(id: u32) -> Self {
        Ids { uid: id, gid: id }
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn prctl(option: libc::c_int, argument: libc::c_int) -> io::Result<()> {
    let argument = libc::c_ulong::from(argument.cast_unsigned());
    // SAFETY: the options used here take numbers.
    check(unsafe { libc::prctl(option, argument, 0, 0, 0) }.into())
}

/// The kernel kills this process when the thread that made it ends. A change of
/// credentials undoes that.
pub fn die_with_parent() -> io::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)
}

/// Becomes a user without other groups, and keeps the capabilities until they are dropped.
pub fn become_user(ids: Ids) -> io::Result<()> {
    // Without the privilege there are no capabilities to keep.
    let _ = prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP);
    set_user(ids)
}

/// Becomes a user without other groups. Root that becomes another loses its capabilities.
pub fn set_user(ids: Ids) -> io::Result<()> {
    let none = std::ptr::null::<libc::gid_t>();
    // SAFETY: an empty list.
    let dropped = check(unsafe { libc::syscall(libc::SYS_setgroups, 0usize, none) });
    match dropped {
        // An ordinary user's are part of who it is.
        Err(error) if error.raw_os_error() != Some(libc::EPERM) => return Err(error),
        _ => {}
    }
    let Ids { uid, gid } = ids;
    // SAFETY: numbers.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: numbers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

/// No program that the thread runs has other capabilities than those of a set of bits.
pub fn bound_capabilities(kept: u64) -> io::Result<()> {
    for capability in (0..CAPABILITIES).filter(|number| kept >> number & 1 == 0) {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            // The kernel has no more of them.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            dropped => dropped?,
        }
    }
    Ok(())
}

/// A program that the thread becomes keeps all capabilities that the thread has, whoever it
/// is (capabilities(7), "ambient").
pub fn keep_capabilities() -> io::Result<()> {
    let header = [CAPABILITY_VERSION, 0];
    // Effective, permitted and inheritable ones: the lower word of each, then the upper.
    let mut sets = [0u32; 6];
    // SAFETY: the header, and the two sets of three words that its version has, to be filled.
    check(unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) })?;
    let [effective, permitted, _, effective_2, permitted_2, _] = sets;
    let sets = [
        effective,
        permitted,
        permitted,
        effective_2,
        permitted_2,
        permitted_2,
    ];
    // SAFETY: the same, to be read.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) })?;
    let all = u64::from(permitted) | u64::from(permitted_2) << 32;
    for capability in (0..u64::BITS).filter(|number| all >> number & 1 == 1) {
        let raise = libc::PR_CAP_AMBIENT_RAISE;
        // SAFETY: numbers.
        check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, capability, 0, 0) }.into())?;
    }
    Ok(())
}

/// Gives up all capabilities and the ways to more; fails if any is left.
pub fn drop_capabilities() -> io::Result<()> {
    // What a thread without privileges is refused here, it does not have.
    let _ = prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL);
    for capability in 0..CAPABILITIES {
        // The kernel has no more of them, or this thread may drop none.
        if prctl(libc::PR_CAPBSET_DROP, capability).is_err() {
            break;
        }
    }
    let bits =
        NOROOT | NO_SETUID_FIXUP | NO_SETUID_FIXUP_LOCKED | KEEP_CAPS_LOCKED | NO_CAP_AMBIENT_RAISE;
    let _ = prctl(libc::PR_SET_SECUREBITS, bits);
    let header = [CAPABILITY_VERSION, 0];
    let none = [0u32; 6];
    // SAFETY: the header, and the two sets of three words that its version has.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) })?;
    let mut left = [u32::MAX; 6];
    // SAFETY: the same, to be filled.
    check(unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), left.as_mut_ptr()) })?;
    match left {
        [0, 0, 0, 0, 0, 0] => Ok(()),
        _ => Err(io::Error::other("some are left")),
    }
}

/// No program that the thread might run gives it privileges.
pub fn no_new_privileges() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// Whether that was said.
pub fn has_no_new_privileges() -> bool {
    // SAFETY: numbers.
    unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 }
}

/// The process's memory is in no core dump, and only root's to look at.
pub fn not_dumpable() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0)
}
