//! What is done around a fork.
//!
//! Always: the few locks that are not one engine's are held, so that a child,
//! which has the forking thread only, can open an engine of its own.
//!
//! Where the kernel does not report forks: fork events need CAP_SYS_PTRACE. Without them a child would read zeros where
//! pages are away, so an engine must bring everything home first. glibc calls
//! hooks around fork(3); a raw clone(2) system call goes past them (see
//! `docs/limits.md`).

use std::cell::{Cell, RefCell};
use std::sync::Once;

use hmm_sync::{Mutex, Rank};

use crate::excluded::{self, ExcludedHold};

/// What an engine does around a fork. Called on the thread that forks.
pub trait ForkHooks: Sync {
    /// Nothing may be away when this returns.
    fn before_fork(&self);
    /// Pages may leave again.
    fn after_fork_in_parent(&self);
}

/// Engines of one process that can be guarded at a time.
const MAX_GUARDED: usize = 16;

static GUARDED: Mutex<[Option<&'static dyn ForkHooks>; MAX_GUARDED]> =
    Mutex::new(Rank::System, [None; MAX_GUARDED]);
static INSTALLED: Once = Once::new();

thread_local! {
    /// Whose hooks were called before this thread's fork: an engine that opens
    /// meanwhile, in another thread, must not be told about its end only.
    static CALLED: Cell<[Option<&'static dyn ForkHooks>; MAX_GUARDED]> =
        const { Cell::new([None; MAX_GUARDED]) };
}

/// What a forking thread holds.
struct Hold {
    excluded: ExcludedHold,
    arena: hmm_mem::ForkHold,
}

thread_local! {
    static HOLD: RefCell<Option<Hold>> = const { RefCell::new(None) };
}

/// Has the locks held around every fork from now on. Hooks that are installed
/// later are called before that.
pub(crate) fn hold_locks_around_forks() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: plain functions that live as long as the process. They take
        // and let go two locks, in the order of their ranks.
        unsafe { libc::pthread_atfork(Some(hold), Some(let_go), Some(let_go_in_child)) };
    });
}

extern "C" fn hold() {
    let hold = Hold {
        excluded: excluded::hold(),
        arena: hmm_mem::hold_for_fork(),
    };
    HOLD.with_borrow_mut(|slot| *slot = Some(hold));
}

extern "C" fn let_go() {
    drop(HOLD.take());
}

extern "C" fn let_go_in_child() {
    if let Some(Hold {
        mut excluded,
        arena,
    }) = HOLD.take()
    {
        drop(arena);
        excluded.clear();
    }
}

/// Has an engine's hooks called around every fork from now on. False when too
/// many engines are guarded.
pub fn guard_forks(hooks: &'static dyn ForkHooks) -> bool {
    INSTALLED.call_once(|| {
        // SAFETY: the hooks are plain functions that live as long as the
        // process; what they may do around a fork they do (they take no lock
        // that the forking thread could hold, and allocate nothing).
        unsafe { libc::pthread_atfork(Some(before), Some(after), None) };
    });
    let mut guarded = GUARDED.lock();
    match guarded.iter_mut().find(|slot| slot.is_none()) {
        Some(slot) => {
            *slot = Some(hooks);
            true
        }
        None => false,
    }
}

/// The opposite of [`guard_forks`].
pub fn unguard_forks(hooks: &'static dyn ForkHooks) {
    let address = std::ptr::from_ref(hooks).cast::<()>();
    for slot in GUARDED.lock().iter_mut() {
        if slot.is_some_and(|other| std::ptr::from_ref(other).cast::<()>() == address) {
            *slot = None;
        }
    }
}

extern "C" fn before() {
    let guarded = *GUARDED.lock();
    CALLED.set(guarded);
    for hooks in guarded.into_iter().flatten() {
        hooks.before_fork();
    }
}

extern "C" fn after() {
    for hooks in CALLED.take().into_iter().flatten() {
        hooks.after_fork_in_parent();
    }
}
