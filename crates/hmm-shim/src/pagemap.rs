//! /proc/self/pagemap, as a kernel with the devices would show it: what is on a
//! device is swapped out, not a hole.

use std::ffi::{CStr, c_int};
use std::sync::atomic::{AtomicBool, Ordering};

use hmm::{PageCount, PageRange, PageResidency, VirtAddr};

use crate::files::Inode;
use crate::{engine, files, user};

const ENTRY: u64 = 8;
/// Bits of an entry.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Entries that are looked at at a time.
const PART: usize = 512;

/// The program has opened a page map.
static OPENED: AtomicBool = AtomicBool::new(false);

/// Takes note of what the program opens.
pub(crate) fn note_open(path: &CStr) {
    if path.to_bytes().ends_with(b"/pagemap") {
        OPENED.store(true, Ordering::Relaxed);
    }
}

/// Whether a descriptor is this process's page map, and that matters.
pub(crate) fn is_own(fd: c_int) -> bool {
    files::any()
        && OPENED.load(Ordering::Relaxed)
        && engine::is_own_process()
        && Inode::of(fd).is_some_and(|inode| Some(inode) == Inode::at(c"/proc/self/pagemap"))
}

/// Marks in what the program has just read which pages are on a device.
pub(crate) fn mark(buffer: u64, len: usize, offset: u64) {
    let Some(engine) = engine::current() else {
        return;
    };
    if !offset.is_multiple_of(ENTRY) {
        return;
    }
    let mut words = [0u64; PART];
    let total = len / size_of::<u64>();
    for from in (0..total).step_by(PART) {
        let words = &mut words[..PART.min(total - from)];
        let at = buffer + from as u64 * ENTRY;
        let first = offset / ENTRY + from as u64;
        let Some(address) = first.checked_mul(hmm::PAGE_SIZE) else {
            return;
        };
        let range = PageRange::new(
            VirtAddr::new(address),
            PageCount::from(words.len()).bytes().get(),
        );
        let (Ok(range), Ok(())) = (range, user::read_words(at, words)) else {
            return;
        };
        let Ok(residency) = engine.hmm.residency(range) else {
            return;
        };
        let mut changed = false;
        for (word, page) in words.iter_mut().zip(residency.pages()) {
            let away = !matches!(page, PageResidency::System | PageResidency::Coherent(_));
            if away && *word & (PRESENT | SWAPPED) == 0 {
                *word |= SWAPPED;
                changed = true;
            }
        }
        if changed {
            let _ = user::write_words(at, words);
        }
    }
}
