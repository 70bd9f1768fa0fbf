//! What is done around a fork.
//!
//! Always: a child, which has the forking thread only, gets lists of excluded
//! memory of its own, so that it can open an engine of its own. (To hold their
//! lock meanwhile would not do: the fork waits until a handler has dealt with it.)
//!
//! Where the kernel does not report forks, which takes CAP_SYS_PTRACE: a child
//! would read zeros where pages are away, so an engine must bring everything home
//! first. glibc calls hooks around fork(3); a raw clone(2) system call goes past
//! them (see `docs/limits.md`).

use std::cell::Cell;
use std::sync::Once;

use hmm_sync::{Mutex, Rank};

use crate::excluded;

/// What an engine, or a device of one, does around a fork. Called on the thread that
/// forks.
pub trait ForkHooks: Sync {
    /// Of an engine without fork events: nothing may be away when this returns.
    fn before_fork(&self);
    /// Pages may leave again.
    fn after_fork_in_parent(&self);
}

/// Engines and devices of one process that can be guarded at a time.
const MAX_GUARDED: usize = 64;

static GUARDED: Mutex<[Option<&'static dyn ForkHooks>; MAX_GUARDED]> =
    Mutex::new(Rank::Queue, [None; MAX_GUARDED]);
static INSTALLED: Once = Once::new();

thread_local! {
    /// Whose hooks were called before this thread's fork: an engine that opens
    /// meanwhile, in another thread, must not be told about its end only.
    static CALLED: Cell<[Option<&'static dyn ForkHooks>; MAX_GUARDED]> =
        const { Cell::new([None; MAX_GUARDED]) };
}

/// Has forked children begin anew with what is not one engine's.
pub(crate) fn prepare_children() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: a plain function that lives as long as the process. It takes
        // no lock.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
}

extern "C" fn in_child() {
    excluded::in_forked_child();
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
    for hooks in CALLED.replace([None; MAX_GUARDED]).into_iter().flatten() {
        hooks.after_fork_in_parent();
    }
}
