//! Calls by which a program has the kernel hold its pages without pinning them.
//!
//! What a pipe or a socket holds must keep its data although the page moves to
//! a device. From the first such call on, pages that leave are not used again.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use crate::calls::is_programs;
use crate::engine::Engine;
use crate::real;

/// The program has made such a call.
static HOLDS: AtomicBool = AtomicBool::new(false);
/// The engine that is to know it. No lock: the calls may come from a signal
/// handler.
static ENGINE: AtomicPtr<Engine> = AtomicPtr::new(std::ptr::null_mut());

fn are_taken() {
    if !is_programs() || HOLDS.swap(true, Ordering::SeqCst) {
        return;
    }
    // SAFETY: engines live as long as the process.
    if let Some(engine) = unsafe { ENGINE.load(Ordering::SeqCst).as_ref() } {
        engine.hmm.stop_reusing_pages();
    }
}

/// An engine has been opened.
pub(crate) fn opened(engine: &'static Engine) {
    ENGINE.store(std::ptr::from_ref(engine).cast_mut(), Ordering::SeqCst);
    if HOLDS.load(Ordering::SeqCst) {
        engine.hmm.stop_reusing_pages();
    }
}

/// Goes on to libc.
///
/// # Safety
/// As vmsplice(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmsplice(
    fd: c_int,
    parts: *const libc::iovec,
    count: usize,
    flags: c_uint,
) -> isize {
    are_taken();
    // SAFETY: the caller's contract.
    unsafe { real::vmsplice(fd, parts, count, flags) }
}

/// Goes on to libc.
///
/// # Safety
/// As setsockopt(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn setsockopt(
    socket: c_int,
    level: c_int,
    option: c_int,
    value: *const c_void,
    len: libc::socklen_t,
) -> c_int {
    if level == libc::SOL_SOCKET && option == libc::SO_ZEROCOPY {
        are_taken();
    }
    // SAFETY: the caller's contract.
    unsafe { real::setsockopt(socket, level, option, value, len) }
}
