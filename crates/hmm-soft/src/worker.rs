//! The threads that run kernels.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::Ordering;

use hmm_device::block_signals;

use crate::guard;
use crate::shootdown::WorkerSlot;
use crate::{Context, SoftDevice};

thread_local! {
    /// The device whose worker this thread is.
    static WORKER_OF: Cell<*const SoftDevice> = const { Cell::new(ptr::null()) };
}

/// Whether the calling thread runs kernels of the device.
pub(crate) fn is_worker_of(device: &SoftDevice) -> bool {
    ptr::eq(WORKER_OF.get(), device)
}

/// What a worker does, from start to end.
pub(crate) fn main(device: &'static SoftDevice, worker: usize) {
    WORKER_OF.set(device);
    block_signals();
    guard::prepare();
    device.shootdown().slots()[worker].set_stack_range(own_stack());
    let context = Context::new(device, worker);
    let board = device.board();
    board.started();
    while let Some(job) = board.claim() {
        device.command_begins();
        let running = device.shootdown().run();
        // SAFETY: whoever launched waits until each claim is finished.
        unsafe { job.drive(&context, board) };
        drop(running);
        board.finish();
    }
}

impl WorkerSlot {
    fn set_stack_range(&self, [first, end]: [usize; 2]) {
        self.stack[0].store(first, Ordering::Relaxed);
        self.stack[1].store(end, Ordering::Release);
    }

    /// First address of the worker's stack, and the one behind it.
    pub(crate) fn stack_range(&self) -> [usize; 2] {
        let end = self.stack[1].load(Ordering::Acquire);
        [self.stack[0].load(Ordering::Relaxed), end]
    }
}

/// First address of the calling thread's stack, and the one behind it; an empty
/// range when the system does not say.
fn own_stack() -> [usize; 2] {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    let mut first = ptr::null_mut();
    let mut len = 0;
    // SAFETY: the attributes are written by the first call (when it succeeds),
    // read by the second and freed by the third.
    let known = unsafe {
        if libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) == 0 {
            let known =
                libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut first, &raw mut len);
            libc::pthread_attr_destroy(attributes.as_mut_ptr());
            known == 0
        } else {
            false
        }
    };
    if known {
        [first.addr(), first.addr() + len]
    } else {
        [0, 0]
    }
}
