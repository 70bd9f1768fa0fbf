//! One thread of the engine.
//!
//! Made with pthread_create(3) and engine memory rather than with
//! `std::thread`: that keeps the closure and its captures on the process heap,
//! whose pages the thread might have to bring home itself.

use std::cell::Cell;
use std::ffi::c_void;
use std::fmt::Write;
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use hmm_mem::EngineAlloc;

use crate::excluded::{exclude, include};
use crate::fatal::{Line, fail};
use crate::stack::Stack;
use crate::thread_locals;

thread_local! {
    /// Which descriptor table this thread shares: 0 is the program's.
    static TABLE: Cell<u32> = const { Cell::new(0) };
}

thread_local! {
    /// A panic of the code that runs now is caught by whoever called it.
    static CATCHES: Cell<bool> = const { Cell::new(false) };
}

/// Runs code of the program on an engine thread, whose caller catches its
/// panics: they are reported like those of the program's own threads. Code of
/// the engine that this code calls in turn goes through [`uncatching`].
pub fn catching<R>(call: impl FnOnce() -> R) -> R {
    with_catches(true, call)
}

/// Runs code of the engine, whose panics nobody may catch.
pub fn uncatching<R>(call: impl FnOnce() -> R) -> R {
    with_catches(false, call)
}

fn with_catches<R>(catches: bool, call: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            CATCHES.set(self.0);
        }
    }
    let _restore = Restore(CATCHES.replace(catches));
    call()
}

/// Whether the calling thread is one of the engine's.
#[must_use]
pub fn is_engine_thread() -> bool {
    table() != 0
}

/// Processors that this process may use, at most 64 of them.
#[must_use]
pub fn allowed_cpus() -> Vec<usize> {
    let allowed = rustix::thread::sched_getaffinity(None);
    (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|&cpu| allowed.is_ok_and(|set| set.is_set(cpu)))
        .take(64)
        .collect()
}

/// Number of the descriptor table that the calling thread shares.
pub(crate) fn table() -> u32 {
    TABLE.get()
}

/// A name as the kernel keeps it: 15 bytes and a zero.
#[derive(Clone, Copy, Debug)]
struct Name([u8; 16]);

impl Name {
    fn new(name: &str) -> Self {
        let mut bytes = [0; 16];
        let len = name.len().min(15);
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        Self(bytes)
    }

    fn as_str(&self) -> &str {
        let len = self.0.iter().position(|&byte| byte == 0).unwrap_or(16);
        std::str::from_utf8(&self.0[..len]).unwrap_or("?")
    }
}

/// A running engine thread. Dropping it lets the thread run on by itself.
#[derive(Debug)]
pub struct EngineThread {
    thread: libc::pthread_t,
    pid: u32,
    /// Given back when the thread has ended, if anybody waits for that.
    stack: ManuallyDrop<Stack>,
}

impl EngineThread {
    /// Waits until the thread's body has returned. In a forked child, where
    /// the thread does not exist, returns at once.
    pub fn join(self) {
        let mut ended = ManuallyDrop::new(self);
        if ended.pid == std::process::id() {
            // SAFETY: a joinable thread, joined once: `self` is used up. Its stack
            // is not used after that, and dropped once.
            unsafe {
                if libc::pthread_join(ended.thread, ptr::null_mut()) == 0 {
                    ManuallyDrop::drop(&mut ended.stack);
                }
            }
        }
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        if self.pid == std::process::id() {
            // SAFETY: a joinable thread that nobody can join any more.
            unsafe { libc::pthread_detach(self.thread) };
        }
    }
}

struct Start<F> {
    body: F,
    name: Name,
    table: u32,
    /// Set when what the thread needs is excluded; `None` if that is its stack
    /// alone.
    excluded: Option<Excluded>,
}

/// A flag that its thread's creator waits for, and keeps until it is set.
struct Excluded(*const AtomicBool);

// SAFETY: the flag is in engine memory and lives until it is set, which is the
// last that is done with it.
unsafe impl Send for Excluded {}

/// Starts a thread that runs `body` with all signals blocked, on a stack that is
/// excluded from migration, and sharing the caller's descriptor table.
pub(crate) fn create<F: FnOnce() + Send + 'static>(
    name: &str,
    cpu: Option<usize>,
    table: u32,
    body: F,
) -> io::Result<EngineThread> {
    report_panics_without_the_heap();
    let excluded = thread_locals::need_table().then(|| hmm_mem::boxed(AtomicBool::new(false)));
    let start = hmm_mem::boxed(Start {
        body,
        name: Name::new(name),
        table,
        excluded: excluded.as_deref().map(|flag| Excluded(flag)),
    });
    let stack = Stack::new()?;
    let attributes = Attributes::new(cpu, &stack)?;
    let mut all = MaybeUninit::uninit();
    let mut before = MaybeUninit::uninit();
    let mut thread = 0;
    let argument = hmm_mem::Box::into_raw(start);
    // SAFETY: sets are filled before they are used. The new thread inherits
    // the mask, so that no handler of the program ever runs on it; the caller's
    // own is put back. `run` takes `argument` over when the thread starts.
    let error = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        let error = libc::pthread_create(
            &raw mut thread,
            &raw const attributes.0,
            run::<F>,
            argument.cast(),
        );
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
        error
    };
    if error != 0 {
        // SAFETY: no thread was made, so nobody else has taken it over.
        drop(unsafe { hmm_mem::Box::from_raw_in(argument, EngineAlloc) });
        return Err(io::Error::from_raw_os_error(error));
    }
    while excluded
        .as_deref()
        .is_some_and(|flag| !flag.load(Ordering::Acquire))
    {
        rustix::thread::sched_yield();
    }
    Ok(EngineThread {
        thread,
        pid: std::process::id(),
        stack: ManuallyDrop::new(stack),
    })
}

/// A thread's attributes before it starts.
struct Attributes(libc::pthread_attr_t);

impl Attributes {
    fn new(cpu: Option<usize>, stack: &Stack) -> io::Result<Self> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: initialises what it is given, or fails.
        let error = unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: initialised above.
        let mut attributes = Self(unsafe { attributes.assume_init() });
        let (lowest, bytes) = stack.usable();
        // SAFETY: initialised attributes; memory for one thread, which keeps it.
        let mut error =
            unsafe { libc::pthread_attr_setstack(&raw mut attributes.0, lowest, bytes) };
        if let (0, Some(cpu)) = (error, cpu) {
            if cpu >= 8 * size_of::<libc::cpu_set_t>() {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            // SAFETY: a set of zeros is an empty one; the index was checked.
            error = unsafe {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(cpu, &mut set);
                libc::pthread_attr_setaffinity_np(
                    &raw mut attributes.0,
                    size_of_val(&set),
                    &raw const set,
                )
            };
        }
        if error == 0 {
            Ok(attributes)
        } else {
            Err(io::Error::from_raw_os_error(error))
        }
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: initialised, and not used again.
        unsafe { libc::pthread_attr_destroy(&raw mut self.0) };
    }
}

extern "C" fn run<F: FnOnce()>(argument: *mut c_void) -> *mut c_void {
    // SAFETY: the box that `create` gave up for this thread.
    let start = unsafe { hmm_mem::Box::from_raw_in(argument.cast::<Start<F>>(), EngineAlloc) };
    let Start {
        body,
        name,
        table,
        excluded,
    } = hmm_mem::Box::into_inner(start);
    TABLE.set(table);
    hmm_sync::enter_engine_thread();
    let locals = excluded.and_then(|Excluded(flag)| {
        let locals = thread_locals::own_table();
        locals.into_iter().for_each(exclude);
        // SAFETY: the creator keeps the flag until this is done.
        unsafe { (*flag).store(true, Ordering::Release) };
        locals
    });
    // SAFETY: 16 bytes with a zero at the end.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.0.as_ptr()) };
    if catch_unwind(AssertUnwindSafe(body)).is_err() {
        // The hook says so first, unless the program has replaced it.
        fail(format_args!(
            "engine thread {} panicked; a fault nobody answers would hang the program, \
             so it ends now",
            name.as_str()
        ));
    }
    locals.into_iter().for_each(include);
    ptr::null_mut()
}

/// Rust's own report of a panic takes locks and reads the heap, both of which
/// may wait for the very thread that panicked. On engine threads this hook
/// writes one line instead and ends the process; on others the hook that was
/// there before goes on.
fn report_panics_without_the_heap() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !is_engine_thread() || CATCHES.get() {
                return before(panic);
            }
            let mut name = Name([0; 16]);
            // SAFETY: the kernel writes at most 16 bytes.
            unsafe { libc::prctl(libc::PR_GET_NAME, name.0.as_mut_ptr()) };
            let mut line = Line::new();
            let _ = write!(line, "hmm: {panic}");
            line.send();
            fail(format_args!(
                "engine thread {} panicked; a fault nobody answers would hang the program, \
                 so it ends now",
                name.as_str()
            ))
        }));
    });
}
