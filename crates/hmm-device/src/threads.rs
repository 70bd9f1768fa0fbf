//! What a device's own threads begin with.

use std::mem::MaybeUninit;
use std::ptr;

/// Keeps the program's signal handlers off the calling thread: they may touch
/// memory that is on a device, which a device's own threads must not.
pub fn block_signals() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` writes the whole set, which the other two then
    // change and read; the mask is this thread's own.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        // A fault of this very thread must be seen.
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGABRT,
        ] {
            libc::sigdelset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
    }
}

/// Ends the process when it is dropped by a panic; the text says at what.
#[derive(Debug)]
pub struct AbortOnUnwind(pub &'static str);

impl AbortOnUnwind {
    /// The danger is over.
    pub fn defuse(self) {
        std::mem::forget(self);
    }
}

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        eprintln!("a device: panic while {}; the process ends", self.0);
        std::process::abort();
    }
}
