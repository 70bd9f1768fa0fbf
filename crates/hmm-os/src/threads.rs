//! The engine's threads and the descriptor table that they share.
//!
//! Programs close descriptors that are not theirs. When the last descriptor of
//! a userfaultfd goes, its ranges are silently unregistered and missing pages
//! read as zeros. So a root thread takes a descriptor table of its own before
//! anything is opened; all other engine threads descend from it and share that
//! table, and whatever has a descriptor is opened on one of them.
//!
//! The new table starts as a copy: everything in it but standard error is
//! closed at once, or the program's pipes would never see their end.

use std::fmt;
use std::io;
use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hmm_hal::Clock;
use hmm_sync::{Condvar, Mutex, Rank, assert_none_held};
use rustix::fs::{Mode, OFlags, open};

use crate::clock::MonotonicClock;
use crate::thread::{EngineThread, create, table};

static NEXT_TABLE: AtomicU32 = AtomicU32::new(1);

/// How long to sleep before looking again; notifications come sooner.
const RECHECK: Duration = Duration::from_secs(1);

/// A call to make on the root thread.
struct Job {
    call: fn(*mut ()),
    argument: *mut (),
}

// SAFETY: the argument leads to a frame whose closure and result are `Send`,
// and whose owner waits until the job is done.
unsafe impl Send for Job {}

struct State {
    job: Option<Job>,
    placed: u64,
    completed: u64,
    stop: bool,
}

/// What the root thread and its callers share; lives for ever.
struct Root {
    state: Mutex<State>,
    changed: Condvar,
}

/// The engine's threads. Dropping it ends the root thread; threads it has
/// spawned run on, and keep the descriptor table.
pub struct EngineThreads {
    root: &'static Root,
    thread: Mutex<Option<EngineThread>>,
    table: u32,
    pid: u32,
}

impl fmt::Debug for EngineThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineThreads")
            .field("table", &self.table)
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl EngineThreads {
    /// Starts the root thread with a descriptor table of its own.
    ///
    /// # Errors
    /// When the process may not have another thread, or the kernel no memory.
    pub fn start() -> io::Result<Self> {
        crate::forks::prepare_children();
        crate::heaps::allow_more();
        // The first look at the clock finds the kernel's fast way to do that; before
        // Linux 6.4 by reading a file into memory of the process heap, which a handler
        // must not touch.
        let _ = MonotonicClock.now_ns();
        let root: &'static Root = hmm_mem::leaked(Root {
            state: Mutex::new(
                Rank::Queue,
                State {
                    job: None,
                    placed: 0,
                    completed: 0,
                    stop: false,
                },
            ),
            changed: Condvar::new(),
        });
        let table = NEXT_TABLE.fetch_add(1, Ordering::Relaxed);
        let threads = Self {
            root,
            thread: Mutex::new(
                Rank::Control,
                Some(create("hmm-root", None, table, || root.serve())?),
            ),
            table,
            pid: std::process::id(),
        };
        threads.run_on_root(take_own_table)?;
        Ok(threads)
    }

    /// Runs a closure on a thread that shares the engine's descriptor table
    /// (the root thread, unless the caller is one itself), and waits for it.
    /// Everything that owns a descriptor is made, and dropped, in here.
    ///
    /// # Panics
    /// In a forked child, where the root thread does not exist. A panic of the
    /// closure ends the process.
    pub fn run_on_root<R: Send>(&self, call: impl FnOnce() -> R + Send) -> R {
        if table() == self.table {
            return call();
        }
        assert!(
            self.pid == std::process::id(),
            "the engine's threads stayed in the parent process; start the engine again here"
        );
        let mut frame = Frame {
            call: Some(call),
            result: None,
        };
        self.root.submit(frame.job());
        match frame.result {
            Some(result) => result,
            None => unreachable!("the job was completed"),
        }
    }

    /// Starts a thread with all signals blocked, pinned to `cpu` if one is
    /// given. A panic of its body ends the process. The kernel keeps the first
    /// 15 bytes of the name.
    ///
    /// # Errors
    /// When the process may not have another thread, or may not use that CPU.
    pub fn spawn(
        &self,
        name: &str,
        cpu: Option<usize>,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<EngineThread> {
        self.run_on_root(|| create(name, cpu, self.table, body))
    }
}

impl EngineThreads {
    /// Ends the root thread; nothing can be run on it or spawned afterwards.
    pub fn end(&self) {
        if self.pid != std::process::id() || table() == self.table {
            return; // not here to be joined, or about to join itself
        }
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            self.root.state.lock().stop = true;
            self.root.changed.notify_all();
            thread.join();
        }
    }
}

impl Drop for EngineThreads {
    fn drop(&mut self) {
        self.end();
    }
}

impl Root {
    /// Body of the root thread.
    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(Job { call, argument }) = state.job.take() {
                drop(state);
                call(argument);
                state = self.state.lock();
                state.completed += 1;
                self.changed.notify_all();
            } else if state.stop {
                return;
            } else {
                state = self.changed.wait_timeout(state, RECHECK);
            }
        }
    }

    /// Has the root thread make the call, and waits until it has returned.
    fn submit(&self, job: Job) {
        assert_none_held();
        let mut state = self.state.lock();
        while state.job.is_some() {
            state = self.changed.wait_timeout(state, RECHECK);
        }
        state.job = Some(job);
        state.placed += 1;
        let ticket = state.placed; // jobs are made one by one, in order
        self.changed.notify_all();
        while state.completed < ticket {
            state = self.changed.wait_timeout(state, RECHECK);
        }
    }
}

/// A closure on its way, and its result on the way back.
struct Frame<F, R> {
    call: Option<F>,
    result: Option<R>,
}

impl<R: Send, F: FnOnce() -> R + Send> Frame<F, R> {
    fn job(&mut self) -> Job {
        Job {
            call: Self::run,
            argument: std::ptr::from_mut(self).cast(),
        }
    }

    fn run(argument: *mut ()) {
        // SAFETY: `job` made the pointer from a frame of this very type, whose
        // owner does not touch it until `submit` returns.
        let frame = unsafe { &mut *argument.cast::<Self>() };
        frame.result = frame.call.take().map(|call| call());
    }
}

/// Leaves the program's descriptor table for an empty one.
fn take_own_table() -> io::Result<()> {
    // SAFETY: from here on this thread's descriptors are its own; it holds
    // none of the program's.
    if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
        return Err(io::Error::last_os_error());
    }
    close_from(3);
    // A stray print must not reach a descriptor of the engine's.
    let null = open(c"/dev/null", OFlags::CLOEXEC | OFlags::RDWR, Mode::empty())?.into_raw_fd();
    // SAFETY: 0 and 1 of this table are nobody else's, and `null` is closed
    // once.
    unsafe {
        libc::dup2(null, 0);
        libc::dup2(null, 1);
        if null > 2 {
            libc::close(null);
        }
    }
    Ok(())
}

/// Closes all descriptors of the thread's table from `first` up.
fn close_from(first: libc::c_uint) {
    // SAFETY: the table was copied a moment ago; nobody uses its descriptors.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    if result != 0 {
        // Before Linux 5.9: one by one, as far as descriptors usually reach.
        for number in first.cast_signed()..65_536 {
            // SAFETY: as above.
            unsafe { libc::close(number) };
        }
    }
}
