//! The fault path allocates nothing from the process's heap and takes no lock
//! that a faulting thread can hold: this binary's allocator ends the process
//! when a handler calls it, and holds a lock while it touches memory that is on
//! a device.

#![allow(clippy::cast_possible_truncation, reason = "a 64-bit test")]
mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use common::{Map, Rng, WORDS, engine, fetch, fork, pattern, send, wait, watchdog};

struct Guarded;

/// Held by whoever allocates while `TOUCHED` is set.
static LOCK: Mutex<()> = Mutex::new(());
static TOUCHED: AtomicUsize = AtomicUsize::new(0);
static TOUCHED_WORDS: AtomicUsize = AtomicUsize::new(0);
static TOUCHES: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// 0: not known yet; 1: any thread; 2: a handler.
    static KIND: Cell<u8> = const { Cell::new(0) };
}

fn check() {
    let kind = KIND.try_with(Cell::get).unwrap_or(1);
    if kind == 1 {
        return;
    }
    let mut kind = kind;
    if kind == 0 && hmm::is_engine_thread() {
        let mut name = [0u8; 16];
        // SAFETY: room for the name of a thread.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        kind = if name.starts_with(b"hmm-handler") {
            2
        } else if name.starts_with(b"hmm-") {
            1
        } else {
            0
        };
        let _ = KIND.try_with(|cell| cell.set(kind));
    }
    if kind == 2 {
        let text = b"a handler thread used the process's heap\n";
        // SAFETY: writes to standard error and ends the process.
        unsafe {
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::abort();
        }
    }
}

fn touch() {
    let at = TOUCHED.load(Ordering::Acquire);
    if at == 0 || hmm::is_engine_thread() {
        return;
    }
    let Ok(_held) = LOCK.lock() else { return };
    let number = TOUCHES.fetch_add(1, Ordering::Relaxed) as usize;
    let index = number.wrapping_mul(WORDS * 37 + 1) % TOUCHED_WORDS.load(Ordering::Relaxed);
    let at = std::ptr::with_exposed_provenance_mut::<u64>(at).wrapping_add(index);
    // SAFETY: the test's mapping, which lives while `TOUCHED` is set.
    let seen = unsafe { at.read_volatile() };
    if seen != pattern(1, index) {
        let text = b"the allocator read wrong data from device memory\n";
        // SAFETY: as above.
        unsafe {
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::abort();
        }
    }
}

// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Guarded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check();
        touch();
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        check();
        touch();
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        check();
        touch();
        // SAFETY: the caller's contract.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Guarded = Guarded;

#[test]
fn the_fault_path_uses_no_heap_and_no_lock_of_a_faulting_thread() {
    let _dog = watchdog(
        "the_fault_path_uses_no_heap_and_no_lock_of_a_faulting_thread",
        100,
    );
    let (hmm, device) = engine(16);
    let map = Map::new(2000);
    map.fill(1);
    // A heavy load of faults of all kinds.
    std::thread::scope(|scope| {
        let (hmm, map, device) = (&hmm, &map, &device);
        for number in 0..3 {
            scope.spawn(move || {
                let mut rng = Rng::new(number + 1);
                for _ in 0..300 {
                    let first = rng.below(1900);
                    let _ = hmm.migrate(map.part(first, 100), device.id()).unwrap();
                    map.check_part(first + rng.below(90), 5, 1);
                }
            });
        }
        scope.spawn(move || {
            let scratch = Map::new(300);
            for _ in 0..50 {
                scratch.fill(2);
                let _ = hmm.migrate(scratch.range(), device.id()).unwrap();
                scratch.advise(50, 100, libc::MADV_DONTNEED);
                scratch.check_zero(50, 100);
                let _ = hmm.exclusive(scratch.part(200, 50), device.id()).unwrap();
                scratch.check_part(200, 100, 2);
            }
        });
        for _ in 0..5 {
            assert_eq!(wait(fork(|| i32::from(map.wrong(0, 2000, 1).is_some()))), 0);
        }
    });
    assert!(hmm.statistics().cpu_faults > 100);
    map.check(1);
    // Threads that fault inside of the allocator, with its lock held.
    send(&hmm, map.range(), &device);
    TOUCHED_WORDS.store(2000 * WORDS, Ordering::Relaxed);
    TOUCHED.store(map.at() as usize, Ordering::Release);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for length in 1..3000usize {
                    std::hint::black_box(vec![1u8; length]);
                }
            });
        }
        for _ in 0..200 {
            let report = hmm.migrate(map.range(), device.id()).unwrap();
            std::hint::black_box(format!("{report} {:?}", hmm.statistics()));
        }
    });
    TOUCHED.store(0, Ordering::Release);
    println!(
        "{} touches with the allocator's lock held",
        TOUCHES.load(Ordering::Relaxed)
    );
    fetch(&hmm, map.range());
    map.check(1);
    drop(map);
    hmm.shutdown().unwrap();
}
