//! The kernel's pool of huge pages.

use std::fs::File;
use std::os::fd::AsRawFd;

/// The pool's size.
pub const SETTING: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages in the kernel's pool, for one test at a time.
pub struct Pool {
    before: String,
    _turn: File,
}

impl Pool {
    /// Fills the pool; what is missing, if that cannot be.
    pub fn of(pages: usize) -> Result<Self, String> {
        let lock = std::env::temp_dir().join("hmm-hugetlb-test.lock");
        let turn = File::create(&lock).map_err(|error| format!("{}: {error}", lock.display()))?;
        // SAFETY: a lock on a file of this test's own.
        if unsafe { libc::flock(turn.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(format!("flock: {}", std::io::Error::last_os_error()));
        }
        let read = || std::fs::read_to_string(SETTING).map_err(|e| format!("{SETTING}: {e}"));
        let before = read()?;
        std::fs::write(SETTING, pages.to_string()).map_err(|e| format!("{SETTING}: {e}"))?;
        let pool = Self {
            before,
            _turn: turn,
        };
        let got = read()?;
        if got.trim() == pages.to_string() {
            Ok(pool)
        } else {
            Err(format!("{pages} huge pages wanted, {} there", got.trim()))
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = std::fs::write(SETTING, &self.before);
    }
}

/// A pool of so many pages, or a skip that says what is missing.
#[macro_export]
macro_rules! pool {
    ($pages:expr) => {
        match $crate::common::pool::Pool::of($pages) {
            Ok(pool) => pool,
            Err(why) => $crate::skip!("{why}"),
        }
    };
}
