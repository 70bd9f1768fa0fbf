//! The order in which locks are taken, and the check of it.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

/// Every lock of the engine, in the order in which they may be taken: a thread
/// that holds a lock may only take locks that stand further down. `docs/locking.md`
/// is checked against this list by a test.
///
/// For all of them: nobody allocates from the process heap, touches memory of
/// the program, waits for a copy or for an event while holding one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Rank {
    /// Serialises requests that change the set of devices, and shutdown. Held
    /// across whole requests, so the fault path never takes it.
    Control = 0,
    /// The gate: the map from addresses to blocks. Held for reading by
    /// everybody who looks at a block or commits a page; for writing while
    /// events are read from the kernel and structural ones applied.
    Gate = 1,
    /// One block's page states. Held while they change and while pages are
    /// moved with one short system call; never across a copy.
    Block = 2,
    /// Pages that forked children have not got yet. Held while one of them is
    /// placed in the child with one short system call.
    Children = 3,
    /// Recycled staging pages.
    Staging = 4,
    /// Notifiers of mirrored ranges.
    Notifiers = 5,
    /// Which system memory a device maps in place. Held while such a mapping is
    /// entered or taken away.
    InPlace = 6,
    /// A device's own: frames, page table directory, queues.
    Device = 7,
    /// What an operating-system back end needs for itself.
    System = 8,
    /// Queues between engine threads, the condition to wait for them, and the
    /// read-ahead streams.
    Queue = 9,
}

impl Rank {
    /// Whether the program's own threads may take it as well: no handler does.
    const fn is_for_all(self) -> bool {
        matches!(self, Self::Control | Self::Queue)
    }

    /// All ranks in order.
    pub const ALL: [Self; 10] = [
        Self::Control,
        Self::Gate,
        Self::Block,
        Self::Children,
        Self::Staging,
        Self::Notifiers,
        Self::InPlace,
        Self::Device,
        Self::System,
        Self::Queue,
    ];
}

thread_local! {
    /// One bit for each rank that this thread holds.
    static HELD: Cell<u16> = const { Cell::new(0) };
    /// This is a thread of the engine's own.
    static OF_ENGINE: Cell<bool> = const { Cell::new(false) };
}

/// There are threads of the engine's own, and others.
static GUARDED: AtomicBool = AtomicBool::new(false);

/// From now on the calling thread is one of the engine's own: it never faults on
/// memory that migrates, and runs no signal handlers of the program's. Others may
/// take no lock that such a thread needs in order to serve a fault; test builds
/// check that.
pub fn enter_engine_thread() {
    OF_ENGINE.set(true);
    GUARDED.store(true, Ordering::Release);
}

/// Proof that a rank was taken; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct Held(
    #[cfg_attr(
        not(debug_assertions),
        allow(dead_code, reason = "only the check reads it")
    )]
    Rank,
);

impl Held {
    pub(crate) fn acquire(rank: Rank) -> Self {
        if cfg!(debug_assertions) && !cfg!(hmm_shuttle) {
            HELD.with(|held| {
                let at_or_above = held.get() >> (rank as u8);
                assert!(
                    rank.is_for_all() || OF_ENGINE.get() || !GUARDED.load(Ordering::Acquire),
                    "a thread of the program takes {rank:?}: a fault while it has it would \
                     never be served"
                );
                assert!(
                    at_or_above == 0,
                    "lock order: {rank:?} asked for while holding {:?}",
                    Rank::ALL
                        .into_iter()
                        .filter(|&other| held.get() & (1 << (other as u8)) != 0)
                        .collect::<Vec<_>>()
                );
                held.set(held.get() | 1 << (rank as u8));
            });
        }
        Self(rank)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if cfg!(debug_assertions) && !cfg!(hmm_shuttle) {
            HELD.with(|held| held.set(held.get() & !(1 << (self.0 as u8))));
        }
    }
}

/// Whether the calling thread holds no lock. False where locks are not tracked: in
/// builds without debug assertions.
#[must_use]
pub fn holds_none() -> bool {
    cfg!(debug_assertions)
        && !cfg!(hmm_shuttle)
        && HELD.with(|held| held.get() & !(1 << (Rank::Control as u8)) == 0)
}

/// Checks that the calling thread holds no lock: what may wait says so.
///
/// # Panics
/// In debug and test builds, when it holds one.
pub fn assert_none_held() {
    if cfg!(debug_assertions) && !cfg!(hmm_shuttle) {
        HELD.with(|held| {
            assert!(
                held.get() & !(1 << (Rank::Control as u8)) == 0,
                "about to wait while holding a lock"
            );
        });
    }
}
