//! A clock that the runner turns.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hmm_hal::Clock;

/// Simulated time. Copies show the same time.
#[derive(Clone, Debug, Default)]
pub struct SimClock(Arc<AtomicU64>);

impl SimClock {
    /// Lets time pass.
    pub fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Clock for SimClock {
    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
