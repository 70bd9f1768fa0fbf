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
/// What memcpy is measured with.
const ROUNDS: usize = 8;

/// Requests of about one size.
struct Class {
    bytes: AtomicU64,
    engine_ns: AtomicU64,
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
                    copy_ns: AtomicU64::new(0),
                }
            }; CLASSES],
        }
    }

    fn class(&self, bytes: u64) -> &Class {
        &self.classes[(bytes.max(1).ilog2() as usize).min(CLASSES - 1)]
    }

    /// The engine's part of a migration.
    pub(crate) fn engine<R>(&self, bytes: u64, work: impl FnOnce() -> R) -> R {
        let class = self.class(bytes);
        class.bytes.fetch_add(bytes, Ordering::Relaxed);
        timed(&class.engine_ns, work)
    }

    /// The copy for the caller.
    pub(crate) fn copy<R>(&self, bytes: u64, work: impl FnOnce() -> R) -> R {
        timed(&self.class(bytes).copy_ns, work)
    }

    fn print(&self, floors: &[Option<f64>; CLASSES]) {
        for (size, class) in self.classes.iter().enumerate().skip(SMALLEST) {
            let engine = class.engine_ns.load(Ordering::Relaxed) as f64;
            let copy = class.copy_ns.load(Ordering::Relaxed) as f64;
            let bytes = class.bytes.load(Ordering::Relaxed) as f64;
            let (true, Some(floor)) = (engine > 0.0, floors[size]) else {
                continue;
            };
            let speed = bytes / engine;
            eprintln!(
                "hmm-shim: {}: {:>6.1} MiB requests: {:>7.1} MiB, engine {speed:>5.1} GB/s \
                 ({:.2} of memcpy), copy for the caller {:>3.0} % of all time",
                self.name,
                (1u64 << size) as f64 / f64::from(1 << 20),
                bytes / f64::from(1 << 20),
                speed / floor,
                100.0 * copy / (engine + copy),
            );
        }
    }

    fn has(&self, class: usize) -> bool {
        self.classes[class].bytes.load(Ordering::Relaxed) > 0
    }
}

fn timed<R>(sum: &AtomicU64, work: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = work();
    let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    sum.fetch_add(ns, Ordering::Relaxed);
    result
}

/// GB/s of memcpy by one thread, from memory to memory that both are there.
fn memcpy(bytes: usize) -> f64 {
    let from = vec![1u8; bytes];
    let mut to = vec![2u8; bytes];
    let start = Instant::now();
    for _ in 0..ROUNDS {
        black_box(&mut to).copy_from_slice(black_box(&from));
    }
    (bytes * ROUNDS) as f64 / start.elapsed().as_nanos() as f64
}

/// Prints both directions, if that was asked for.
pub(crate) fn print_if_wanted() {
    if std::env::var_os(VARIABLE).is_none() {
        return;
    }
    let both = [&TO_DEVICE, &TO_SYSTEM];
    let floors = std::array::from_fn(|size| {
        let wanted = size >= SMALLEST && both.iter().any(|times| times.has(size));
        wanted.then(|| memcpy(1 << size))
    });
    for times in both {
        times.print(&floors);
    }
}
