//! The engine of this process, through forks.
//!
//! It is opened with the first device file. A forked child has none: its
//! parent's stays where it is, and serves the child until it has all of its
//! pages. When the child opens a device itself, that is waited for first.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hmm::{ByteCount, Hmm, PageCount, SoftwareDevice, SoftwareOptions};

use crate::errno::Errno;
use crate::files::{self, FIRST_COHERENT, UNITS};
use crate::references;
use crate::times;

/// Pages that are copied between device and program at a time: few enough that
/// they stay in a processor's cache.
pub(crate) const CHUNK_PAGES: u64 = 64;
/// Memory of each device, unless `HMM_DEVICE_MEMORY` says how many MiB.
const DEVICE_MEMORY: ByteCount = ByteCount::mib(1024);
/// How long a child waits for its parent's engine.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(30);
/// How long a process that ends waits for its children to get their pages.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(30);

/// An engine with its devices. Lives as long as the process.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) hmm: Hmm,
    /// The devices that have been opened.
    units: [OnceLock<Unit>; UNITS],
}

/// A device.
#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) device: SoftwareDevice,
    /// Engine memory for data between the device and the program.
    pub(crate) buffer: Mutex<hmm_mem::Vec<u8>>,
    /// Nothing is copied to such a device: there are no times to be had.
    pub(crate) coherent: bool,
}

impl Engine {
    /// A device, if it has been opened.
    pub(crate) fn unit(&self, number: usize) -> Option<&Unit> {
        self.units[number].get()
    }
}

static ENGINE: Mutex<Option<&'static Engine>> = Mutex::new(None);
/// The process whose memory this is. Another number means: a child of vfork(2)
/// or of a raw system call, which must leave everything alone.
static OWNER: AtomicU32 = AtomicU32::new(0);
/// This process was forked from one that had an engine.
static INHERITED: AtomicBool = AtomicBool::new(false);

fn lock() -> MutexGuard<'static, Option<&'static Engine>> {
    ENGINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the calling thread's process is the one whose memory this is.
pub(crate) fn is_own_process() -> bool {
    let owner = OWNER.load(Ordering::Acquire);
    owner == 0 || owner == std::process::id()
}

/// The engine, if it has been opened.
pub(crate) fn current() -> Option<&'static Engine> {
    if is_own_process() { *lock() } else { None }
}

/// Opens a device, and the engine if need be.
pub(crate) fn open(unit: usize) -> Result<(), Errno> {
    if !is_own_process() {
        return Err(Errno::NODEV);
    }
    install_hooks();
    let mut slot = lock();
    let refused = |error| {
        complain(&format!("cannot open the device: {error}"));
        Errno::NODEV
    };
    if let Some(engine) = *slot {
        return add_unit(engine, unit).map_err(refused);
    }
    if INHERITED.load(Ordering::Acquire) && !Hmm::await_handover(HANDOVER_PATIENCE) {
        complain("the parent's engine has not handed this process's memory over");
        return Err(Errno::BUSY);
    }
    let engine: &'static Engine = Box::leak(Box::new(start().map_err(refused)?));
    *slot = Some(engine);
    references::opened(engine);
    add_unit(engine, unit).map_err(refused)
}

fn start() -> Result<Engine, hmm::Error> {
    // As with the driver, a page comes home when it is touched, and no other
    // with it: another thread may just be looking at those on its device.
    let hmm = Hmm::builder()
        .fault_granule(PageCount::ONE)
        .readahead(false)
        .open()?;
    Ok(Engine {
        hmm,
        units: [const { OnceLock::new() }; UNITS],
    })
}

/// Adds a device unless it is there. One thread at a time.
fn add_unit(engine: &Engine, number: usize) -> Result<(), hmm::Error> {
    const NAMES: [&str; UNITS] = [
        "hmm_dmirror0",
        "hmm_dmirror1",
        "hmm_dmirror2",
        "hmm_dmirror3",
    ];
    if engine.unit(number).is_some() {
        return Ok(());
    }
    let memory = std::env::var("HMM_DEVICE_MEMORY")
        .ok()
        .and_then(|mebibytes| mebibytes.parse().ok())
        .map_or(DEVICE_MEMORY, ByteCount::mib);
    let coherent = number >= FIRST_COHERENT;
    let options = SoftwareOptions::new(memory)
        .name(NAMES[number])
        .workers(1)
        .coherent(coherent);
    let device = engine.hmm.add_software_device(options)?;
    let mut buffer = hmm_mem::vec();
    buffer.resize(PageCount::new(CHUNK_PAGES).bytes_usize(), 0);
    engine.units[number].get_or_init(|| Unit {
        device,
        buffer: Mutex::new(buffer),
        coherent,
    });
    Ok(())
}

fn complain(text: &str) {
    eprintln!("hmm-shim: {text}");
}

/// What is done around forks and at the end of the process.
fn install_hooks() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        OWNER.store(std::process::id(), Ordering::Release);
        // SAFETY: plain functions that live as long as the process; the hooks
        // take this library's two locks and let them go.
        unsafe {
            libc::pthread_atfork(Some(hold), Some(let_go), Some(let_go_in_child));
            libc::atexit(farewell);
            at_quick_exit(farewell);
        }
    });
}

unsafe extern "C" {
    /// As atexit(3), for quick_exit(3).
    fn at_quick_exit(function: extern "C" fn()) -> std::ffi::c_int;
}

thread_local! {
    static HOLD: std::cell::RefCell<Option<Hold>> = const { std::cell::RefCell::new(None) };
}

/// What a thread holds while it forks, so that the child does not find it
/// locked by a thread that it does not have.
struct Hold {
    engine: MutexGuard<'static, Option<&'static Engine>>,
    files: MutexGuard<'static, [Option<files::File>; files::MAX_FILES]>,
}

extern "C" fn hold() {
    let hold = Hold {
        engine: lock(),
        files: files::lock(),
    };
    HOLD.with_borrow_mut(|slot| *slot = Some(hold));
}

extern "C" fn let_go() {
    drop(HOLD.take());
}

extern "C" fn let_go_in_child() {
    OWNER.store(std::process::id(), Ordering::Release);
    if let Some(mut hold) = HOLD.take() {
        if hold.engine.take().is_some() {
            INHERITED.store(true, Ordering::Release);
        }
        files::forget_all(&mut hold.files);
    }
}

/// Before the process ends: forked children get what they are owed, or they
/// would read zeros.
extern "C" fn farewell() {
    farewell_now();
}

/// The same for who leaves without its exit handlers.
pub(crate) fn farewell_now() {
    const NAP: Duration = Duration::from_millis(1);
    let Some(engine) = current() else { return };
    let since = Instant::now();
    while engine.hmm.owes_children() {
        if since.elapsed() > FAREWELL_PATIENCE {
            complain("a forked child has not got all of its pages; it will read zeros");
            break;
        }
        std::thread::sleep(NAP);
    }
    times::print_if_wanted();
}
