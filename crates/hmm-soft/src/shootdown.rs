//! How unmapping waits for accesses that are under way.
//!
//! A worker touches frames and staging pages inside of an *access section*
//! only:
//!
//! ```text
//! worker                                  whoever unmaps
//!   active = epoch                          entries = 0
//!   (light barrier)                         epoch += 1
//!   read the page's entry                   (heavy barrier)
//!   access the frame                        wait until each worker's active is
//!   active = 0                                0, or an epoch of after the clear
//! ```
//!
//! Either the worker's `active` is visible behind the heavy barrier, and is
//! waited for, or the worker reads the entry behind it, and finds it cleared.
//! The heavy barrier is membarrier(2), which makes every running thread of the
//! process execute one; the light one then only has to stop the compiler. On
//! kernels without membarrier both are real fences.
//!
//! A section ends soon: it runs a handful of instructions (at most one copy of
//! a page) and touches no memory but the device's, staging pages and the
//! worker's stack, none of which can fault into the engine. So waiting for it
//! is allowed with a block locked. A worker that is entered again and again is
//! waited for once: it shows the newer epoch then.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, compiler_fence, fence};
use std::time::Duration;

use crate::stats::WorkerCounters;

/// Looks at a worker's flag before the processor is yielded.
const SPINS: u32 = 2000;
/// Yields before the thread sleeps: a worker of lower priority must get to run.
const YIELDS: u32 = 2000;
/// How long it sleeps then, at a time.
const NAP: Duration = Duration::from_micros(50);

/// One worker's part, on cache lines of its own.
#[repr(align(128))]
#[derive(Debug, Default)]
pub(crate) struct WorkerSlot {
    /// The epoch in which the current access section began; 0 outside of one.
    active: AtomicU64,
    /// What the worker counts.
    pub(crate) counters: WorkerCounters,
    /// First address of the worker's stack, and the one behind it; 0 before it
    /// has started.
    pub(crate) stack: [AtomicUsize; 2],
}

/// An access section; ends when dropped.
pub(crate) struct Section<'a> {
    active: &'a AtomicU64,
}

impl Drop for Section<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        self.active.store(0, Ordering::Release);
    }
}

#[repr(align(128))]
struct Padded<T>(T);

/// The protocol's shared part.
pub(crate) struct Shootdown {
    epoch: Padded<AtomicU64>,
    /// Workers that run a kernel, and do not wait for the engine.
    running: Padded<AtomicUsize>,
    /// No membarrier here: sections begin with a real fence.
    fences: AtomicBool,
    slots: hmm_mem::Vec<WorkerSlot>,
}

impl Shootdown {
    /// For this many workers; with membarrier(2) if wanted and available.
    pub(crate) fn new(workers: usize, membarrier: bool) -> Self {
        let mut slots = hmm_mem::vec_with_capacity(workers);
        slots.resize_with(workers, WorkerSlot::default);
        Self {
            epoch: Padded(AtomicU64::new(1)),
            running: Padded(AtomicUsize::new(0)),
            fences: AtomicBool::new(!(membarrier && register_membarrier())),
            slots,
        }
    }

    /// Whether sections begin with a real fence, for lack of membarrier(2).
    pub(crate) fn uses_fences(&self) -> bool {
        self.fences.load(Ordering::Relaxed)
    }

    /// The workers' parts.
    pub(crate) fn slots(&self) -> &[WorkerSlot] {
        &self.slots
    }

    /// Begins an access section of the calling worker.
    #[inline(always)]
    pub(crate) fn enter<'a>(&self, slot: &'a WorkerSlot) -> Section<'a> {
        // Release: whoever sees this section has seen the end of the last one.
        slot.active
            .store(self.epoch.0.load(Ordering::Relaxed), Ordering::Release);
        if self.fences.load(Ordering::Relaxed) {
            fence(Ordering::SeqCst);
        } else {
            compiler_fence(Ordering::SeqCst);
        }
        Section {
            active: &slot.active,
        }
    }

    /// The calling worker runs a kernel until the value is dropped.
    pub(crate) fn run(&self) -> Running<'_> {
        self.running.0.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        Running(&self.running.0)
    }

    /// The calling worker, which runs a kernel, waits for the engine and
    /// accesses nothing until the value is dropped. Spares whoever unmaps
    /// meanwhile the heavy barrier, when no other worker runs.
    pub(crate) fn pause(&self) -> Paused<'_> {
        self.running.0.fetch_sub(1, Ordering::SeqCst);
        Paused(&self.running.0)
    }

    /// Waits until no access is under way that began before the call. Says how
    /// many workers it had to wait for, or `None` when no kernel runs.
    pub(crate) fn wait(&self) -> Option<u64> {
        let epoch = self.epoch.0.fetch_add(1, Ordering::SeqCst) + 1;
        fence(Ordering::SeqCst);
        if self.running.0.load(Ordering::SeqCst) == 0 {
            return None;
        }
        if !self.uses_fences() {
            heavy_barrier();
        }
        let mut waited = 0;
        for slot in &self.slots {
            let mut rounds = 0;
            loop {
                let active = slot.active.load(Ordering::Acquire);
                if active == 0 || active >= epoch {
                    break;
                }
                rounds += 1;
                if rounds < SPINS {
                    std::hint::spin_loop();
                } else if rounds < SPINS + YIELDS {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(NAP);
                }
            }
            waited += u64::from(rounds > 0);
        }
        Some(waited)
    }
}

impl fmt::Debug for Shootdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shootdown")
            .field("epoch", &self.epoch.0)
            .field("running", &self.running.0)
            .field("fences", &self.fences)
            .finish_non_exhaustive()
    }
}

/// A worker runs a kernel; see [`Shootdown::run`].
pub(crate) struct Running<'a>(&'a AtomicUsize);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A worker waits for the engine; see [`Shootdown::pause`].
pub(crate) struct Paused<'a>(&'a AtomicUsize);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
}

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: membarrier(2) takes two integers and touches no memory.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0) == 0 }
}

fn register_membarrier() -> bool {
    membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
        && membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
}

fn heavy_barrier() {
    let done = membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) || register_membarrier();
    assert!(
        done,
        "membarrier(2) worked when the device was opened, and fails now: {}",
        std::io::Error::last_os_error()
    );
}
