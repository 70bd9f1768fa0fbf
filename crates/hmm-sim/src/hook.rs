//! Where others run while the engine works without locks.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A call of the engine in which others run: it makes them without locks, but
/// for [`HookPoint::Read`] and [`HookPoint::Register`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPoint {
    /// Before transfers are handed to a device.
    Submit,
    /// Before and after the wait for a fence.
    Wait,
    /// The engine met [`hmm_hal::Stop::Again`] and lets others run.
    Relax,
    /// An engine thread waits until its own event has been read.
    WaitForEvent,
    /// An engine thread stopped at a page that is to be served.
    WaitForFault,
    /// Between two pages that are being un-shared.
    Unshare,
    /// While staging memory is filled.
    Provision,
    /// Between the reading of an event of the engine's own and the zap.
    Discard,
    /// An event was read, with the gate held: the thread that sent it runs on.
    Read,
    /// Before zeros are put somewhere without a lock.
    Fill,
    /// Before and after the kernel registers memory, with the gate held.
    Register,
}

impl HookPoint {
    /// Whether the engine has the gate, so that only the program runs.
    #[must_use]
    pub const fn has_gate(self) -> bool {
        matches!(self, Self::Read | Self::Register)
    }

    /// Whether the caller can only go on when an event has been read.
    #[must_use]
    pub const fn needs_reader(self) -> bool {
        matches!(self, Self::Relax | Self::WaitForEvent | Self::WaitForFault)
    }
}

/// What runs at a hook point.
pub type Hook = dyn Fn(HookPoint) + Send + Sync;

/// The hook and how deeply it is nested.
#[derive(Default)]
pub(crate) struct HookSlot {
    hook: Mutex<Option<Arc<Hook>>>,
    depth: AtomicU32,
}

/// Depth up to which anything at all runs; actors stop much earlier.
const MAX_DEPTH: u32 = 16;

impl HookSlot {
    pub(crate) fn install(&self, hook: Option<Arc<Hook>>) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = hook;
    }

    /// How many hooks are running, one inside the other.
    pub(crate) fn depth(&self) -> u32 {
        self.depth.load(Ordering::Relaxed)
    }

    /// Runs the hook. The simulator holds no lock here, and checks that the
    /// engine does not either.
    pub(crate) fn call(&self, point: HookPoint) {
        if !point.has_gate() {
            hmm_sync::assert_none_held();
        }
        let hook = self
            .hook
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(hook) = hook
            && self.depth() < MAX_DEPTH
        {
            self.depth.fetch_add(1, Ordering::Relaxed);
            hook(point);
            self.depth.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for HookSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HookSlot(depth {})", self.depth())
    }
}
