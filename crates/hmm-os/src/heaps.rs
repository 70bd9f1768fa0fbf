//! Heaps for the threads of drivers.
//!
//! glibc gives threads heaps (arenas) of their own, 8 for each processor. When there are
//! no more, threads share them, and what a driver needs in order to work then lies on the
//! same pages as what the program gives to a device. An engine and a driver have some
//! twenty threads, so on a small machine that is soon so.

use std::sync::Once;

/// Heaps that there may be beyond those that there can be anyway.
const MORE: usize = 64;

/// Lets there be more heaps, unless whoever started the process has said how many there may
/// be. Has no effect once there are more than 8.
pub(crate) fn allow_more() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        let tuned = |name, word| {
            std::env::var_os(name).is_some_and(|value| value.to_string_lossy().contains(word))
        };
        if tuned("MALLOC_ARENA_MAX", "") || tuned("GLIBC_TUNABLES", "arena") {
            return;
        }
        #[cfg(target_env = "gnu")]
        {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            let most = i32::try_from(8 * processors + MORE).unwrap_or(i32::MAX);
            // SAFETY: it changes how many heaps later threads may get, and nothing else.
            unsafe { libc::mallopt(libc::M_ARENA_MAX, most) };
        }
    });
}
