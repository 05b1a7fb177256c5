//! Vector registers that the CPU has and the guest's kernel does not save.
//!
//! Where the host's KVM runs a guest's programs natively and does not intercept `cpuid`
//! (PVM), programs see all of the host's CPU, its AVX-512 too, while the guest's kernel,
//! which asks KVM, may be without XSAVE. It saves the SSE registers alone when it
//! switches between processes, and whoever copies memory with wider ones, as glibc does,
//! loses some of it now and then: the first bytes of a message, a pointer in a list.

#![allow(unsafe_code, reason = "a question to the kernel")]

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The variable that glibc reads its settings from.
const VARIABLE: &str = "GLIBC_TUNABLES";
/// The functions that it then chooses know SSE alone (`sysdeps/x86/cpu-tunables.c`).
const SSE_ONLY: &str = "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-FMA,\
                        -AVX_Fast_Unaligned_Load,-XSAVE,-XSAVEC";
/// The bit of AVX's registers in XCR0 (Intel's manual, volume 1, 13.1).
const AVX: u64 = 1 << 2;

/// Starts this program again if glibc has chosen functions whose registers are not
/// saved: it does so before `main`.
pub fn keep_to_saved() {
    if env::var_os(VARIABLE).is_some() || !lacking(cpu_has_avx(), saved()) {
        return;
    }
    let mut words = env::args_os();
    let Some(program) = words.next() else { return };
    // If that fails, this one is better than none.
    let _ = Command::new(program)
        .args(words)
        .env(VARIABLE, SSE_ONLY)
        .exec();
}

/// What the programs that are started here need for the same reason.
pub fn environment() -> Option<(&'static str, String)> {
    Some((VARIABLE, env::var(VARIABLE).ok()?))
}

fn cpu_has_avx() -> bool {
    std::is_x86_feature_detected!("avx")
}

/// Which registers the kernel saves, as XCR0 has them; nothing if it does not say.
fn saved() -> Option<u64> {
    const ARCH_GET_XCOMP_SUPP: libc::c_int = 0x1021; // Linux' asm/prctl.h, since 5.16
    let mut features = 0_u64;
    // SAFETY: writes a number to a live one.
    let asked =
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &raw mut features) };
    (asked == 0).then_some(features)
}

/// Programs would use what is not saved.
fn lacking(cpu_has_avx: bool, saved: Option<u64>) -> bool {
    cpu_has_avx && saved.is_some_and(|features| features & AVX == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kernel_that_says_so_saves_too_little() {
        for (cpu_has_avx, saved, expected) in [
            (true, Some(0b011), true),
            (true, Some(0b111), false),
            (true, Some(0xe7), false),
            (false, Some(0b011), false),
            (true, None, false),
        ] {
            assert_eq!(lacking(cpu_has_avx, saved), expected);
        }
        // Where tests run, the kernel saves what its CPU has.
        assert!(!lacking(cpu_has_avx(), saved()));
    }
}
