//! What a driver has loaded stays loaded, and stays where it is.
//!
//! With the last instance the Vulkan loader unloads the drivers. But a thread that has called
//! one can keep data of the thread's own whose destructor is code of the driver's, and
//! that is run when the thread ends (Mesa's Venus does that): the process would be lost.
//! It is not known which threads have called a driver, so nothing may go that an instance
//! has brought.
//!
//! What the C library knows of an object it allocates from the heap of the thread that loads
//! it, and needs again at any call from one object to another one for the first time. Were
//! that memory on a device, the driver would wait for a page that waits for the
//! driver. So all of it is loaded by a thread of its own, which does not end before the
//! process does: its heap is nobody else's, and is excluded from migration as a whole.
//! (What the program has loaded itself, with a lazily bound driver in it, lies in the
//! program's heaps.)

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_int, c_void};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};

use hmm_device::block_signals;
use hmm_types::PageRange;

use crate::VulkanError;
use crate::footprint::heap_of_this_thread;

type Job = Box<dyn FnOnce() + Send>;

/// The thread that loads.
struct Loader {
    /// It stays in a process that is forked from this one.
    process: u32,
    jobs: Sender<Job>,
}

static LOADER: Mutex<Option<Loader>> = Mutex::new(None);
/// The heaps of all of them.
static HEAPS: Mutex<Vec<PageRange>> = Mutex::new(Vec::new());

/// Runs on the thread that loads; waits for the end.
pub(crate) fn on_loader<R: Send + 'static>(
    job: impl FnOnce() -> R + Send + 'static,
) -> Result<R, VulkanError> {
    let failed = |reason| VulkanError::Spawn {
        thread: LOADER_THREAD,
        reason,
    };
    let (done, is_done) = channel();
    let job: Job = Box::new(move || {
        let _ = done.send(job());
    });
    let mut loader = LOADER.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    let known = loader.take().filter(|loader| loader.process == process);
    let known = match known {
        Some(known) => known,
        None => Loader {
            process,
            jobs: begin().map_err(|error| failed(error.kind()))?,
        },
    };
    let sent = known.jobs.send(job).is_ok();
    *loader = Some(known);
    drop(loader);
    let ended = std::io::ErrorKind::BrokenPipe;
    let result = if sent { is_done.recv().ok() } else { None };
    result.ok_or_else(|| failed(ended))
}

/// The heaps with what the C library knows of drivers.
pub(crate) fn heaps() -> Vec<PageRange> {
    let heaps = HEAPS.lock().unwrap_or_else(PoisonError::into_inner);
    heaps.clone()
}

const LOADER_THREAD: &str = "hmm-vulkan-load";

fn begin() -> std::io::Result<Sender<Job>> {
    let (jobs, take) = channel::<Job>();
    let body = move || {
        block_signals();
        if let Some(heap) = heap_of_this_thread() {
            let mut heaps = HEAPS.lock().unwrap_or_else(PoisonError::into_inner);
            if !heaps.contains(&heap) {
                heaps.push(heap);
            }
        }
        while let Ok(job) = take.recv() {
            job();
        }
    };
    let name = LOADER_THREAD.to_owned();
    let thread = std::thread::Builder::new().name(name).spawn(body)?;
    // It ends with the process.
    drop(thread);
    Ok(jobs)
}

/// The shared objects that were loaded at some moment, by the names of their files.
pub(crate) struct Objects(BTreeSet<CString>);

impl Objects {
    pub(crate) fn now() -> Self {
        let mut names = BTreeSet::new();
        // SAFETY: the callback gets the pointer to `names`, which lives on, and is called
        // on this thread before the call returns.
        unsafe {
            libc::dl_iterate_phdr(Some(note), (&raw mut names).cast());
        }
        Self(names)
    }

    /// Keeps what has been loaded since for the rest of the process's life.
    pub(crate) fn keep_new(&self) {
        let Self(now) = Self::now();
        for name in now.difference(&self.0) {
            let flags = libc::RTLD_LAZY | libc::RTLD_NOLOAD | libc::RTLD_NODELETE;
            // SAFETY: nothing is loaded that is not there already. One more reference is
            // taken and given back; what it has said of unloading stays.
            unsafe {
                let object = libc::dlopen(name.as_ptr(), flags);
                if !object.is_null() {
                    libc::dlclose(object);
                }
            }
        }
    }
}

unsafe extern "C" fn note(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    names: *mut c_void,
) -> c_int {
    // SAFETY: the C library passes a valid structure, whose name is a text or null, and
    // `names` is what `now` has passed.
    unsafe {
        let name = (*info).dlpi_name;
        if !name.is_null() {
            let names = &mut *names.cast::<BTreeSet<CString>>();
            names.insert(CStr::from_ptr(name).to_owned());
        }
    }
    0
}
