//! Where the time of migrations goes: to the engine, or to the driver's own copy
//! of the data for the caller, which the interface asks for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Set, to any value, to have the times printed when the process ends.
const VARIABLE: &str = "HMM_SHIM_REPORT";

/// One direction.
pub(crate) struct Times {
    name: &'static str,
    bytes: AtomicU64,
    engine_ns: AtomicU64,
    copy_ns: AtomicU64,
}

pub(crate) static TO_DEVICE: Times = Times::new("system to device");
pub(crate) static TO_SYSTEM: Times = Times::new("device to system");

impl Times {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            bytes: AtomicU64::new(0),
            engine_ns: AtomicU64::new(0),
            copy_ns: AtomicU64::new(0),
        }
    }

    /// The engine's part of a migration.
    pub(crate) fn engine<R>(&self, bytes: u64, work: impl FnOnce() -> R) -> R {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        timed(&self.engine_ns, work)
    }

    /// The copy for the caller.
    pub(crate) fn copy<R>(&self, work: impl FnOnce() -> R) -> R {
        timed(&self.copy_ns, work)
    }

    fn print(&self) {
        let engine = self.engine_ns.load(Ordering::Relaxed) as f64;
        let copy = self.copy_ns.load(Ordering::Relaxed) as f64;
        let bytes = self.bytes.load(Ordering::Relaxed) as f64;
        if engine > 0.0 {
            eprintln!(
                "hmm-shim: {}: {:.0} MiB, engine {:.1} ms ({:.1} GB/s), copy for the caller \
                 {:.1} ms ({:.0} % of all)",
                self.name,
                bytes / f64::from(1 << 20),
                engine / 1e6,
                bytes / engine,
                copy / 1e6,
                100.0 * copy / (engine + copy),
            );
        }
    }
}

fn timed<R>(sum: &AtomicU64, work: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = work();
    let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    sum.fetch_add(ns, Ordering::Relaxed);
    result
}

/// Prints both directions, if that was asked for.
pub(crate) fn print_if_wanted() {
    if std::env::var_os(VARIABLE).is_some() {
        TO_DEVICE.print();
        TO_SYSTEM.print();
    }
}
