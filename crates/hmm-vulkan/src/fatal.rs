//! The end of the process, where going on would lose data.

/// Writes a message, without the heap, and ends the process.
pub(crate) fn die(message: &'static str) -> ! {
    // SAFETY: the message is there for the whole call; what was not written is lost.
    unsafe { libc::write(2, message.as_ptr().cast(), message.len()) };
    std::process::abort()
}
