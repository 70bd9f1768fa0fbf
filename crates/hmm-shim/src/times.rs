//! Where the time of migrations goes: to the engine, or to the driver's own copy
//! of the data for the caller, which the interface asks for.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Set, to any value, to have the times printed when the process ends.
const VARIABLE: &str = "HMM_SHIM_REPORT";
/// Sizes are told apart by the power of two that is not above them; the last
/// class is of 1 GiB and more.
const CLASSES: usize = 31;
/// Smaller requests are not worth a line.
const SMALLEST: usize = 19;
/// Bytes that memcpy is measured with: as with a migration, what it reads and
/// writes is not in the caches.
const COLD_BYTES: usize = 64 << 20;

/// Requests of about one size.
struct Class {
    bytes: AtomicU64,
    engine_ns: AtomicU64,
    /// The shortest time of the engine for one request.
    fastest_ns: AtomicU64,
    copy_ns: AtomicU64,
}

/// One direction.
pub(crate) struct Times {
    name: &'static str,
    classes: [Class; CLASSES],
}

pub(crate) static TO_DEVICE: Times = Times::new("system to device");
pub(crate) static TO_SYSTEM: Times = Times::new("device to system");

impl Times {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            classes: [const {
                Class {
                    bytes: AtomicU64::new(0),
                    engine_ns: AtomicU64::new(0),
                    fastest_ns: AtomicU64::new(u64::MAX),
                    copy_ns: AtomicU64::new(0),
                }
            }; CLASSES],
        }
    }

    fn class(&self, bytes: u64) -> &Class {
        &self.classes[(bytes.max(1).ilog2() as usize).min(CLASSES - 1)]
    }

    /// The engine's part of a migration, which says how many bytes it moved.
    pub(crate) fn engine<E>(&self, work: impl FnOnce() -> Result<u64, E>) -> Result<u64, E> {
        let (result, ns) = timed(work);
        let bytes = *result.as_ref().unwrap_or(&0);
        if bytes == 0 {
            return result;
        }
        let class = self.class(bytes);
        class.bytes.fetch_add(bytes, Ordering::Relaxed);
        class.engine_ns.fetch_add(ns, Ordering::Relaxed);
        class.fastest_ns.fetch_min(ns, Ordering::Relaxed);
        result
    }

    /// The copy for the caller.
    pub(crate) fn copy<R>(&self, bytes: u64, work: impl FnOnce() -> R) -> R {
        let (result, ns) = timed(work);
        self.class(bytes).copy_ns.fetch_add(ns, Ordering::Relaxed);
        result
    }

    fn print(&self, floor: f64) {
        for (size, class) in self.classes.iter().enumerate().skip(SMALLEST) {
            let engine = class.engine_ns.load(Ordering::Relaxed) as f64;
            let fastest = class.fastest_ns.load(Ordering::Relaxed) as f64;
            let copy = class.copy_ns.load(Ordering::Relaxed) as f64;
            let bytes = class.bytes.load(Ordering::Relaxed) as f64;
            if engine == 0.0 {
                continue;
            }
            let best = (1u64 << size) as f64 / fastest;
            eprintln!(
                "hmm-shim: {}, requests of {:>5.1} MiB: engine {:>4.1} GB/s, fastest {best:>4.1} \
                 ({:.2} of memcpy); copy for the caller {:>2.0} % of the time",
                self.name,
                (1u64 << size) as f64 / f64::from(1 << 20),
                bytes / engine,
                best / floor,
                100.0 * copy / (engine + copy),
            );
        }
    }
}

fn timed<R>(work: impl FnOnce() -> R) -> (R, u64) {
    let start = Instant::now();
    let result = work();
    let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    (result, ns)
}

/// GB/s of memcpy by one thread; not a number when there is no memory for it.
fn memcpy() -> f64 {
    let filled = |byte| {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(COLD_BYTES).ok()?;
        bytes.resize(COLD_BYTES, byte);
        Some(bytes)
    };
    let (Some(from), Some(mut to)) = (filled(1u8), filled(2u8)) else {
        return f64::NAN;
    };
    let once = |_| timed(|| black_box(&mut to).copy_from_slice(black_box(&from))).1;
    let fastest = (0..5).map(once).min().unwrap_or(u64::MAX);
    COLD_BYTES as f64 / fastest as f64
}

/// Prints both directions, if that was asked for.
pub(crate) fn print_if_wanted() {
    if std::env::var_os(VARIABLE).is_some() {
        let floor = memcpy();
        eprintln!("hmm-shim: memcpy of what is not in the caches: {floor:.1} GB/s");
        TO_DEVICE.print(floor);
        TO_SYSTEM.print(floor);
    }
}
