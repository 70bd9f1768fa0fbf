//! Address ranges that never migrate: the engine's own memory.
//!
//! A thread that serves faults must not fault on what it serves. So its stack,
//! the engine's tables and staging, and the data of every loaded object (which
//! holds the engine's, libc's and the loader's state) stay where they are.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use hmm_sync::{Mutex, MutexGuard, Rank};
use hmm_types::{PageRange, VirtAddr};

struct Lists {
    /// Added and taken away one by one.
    ranges: hmm_mem::Vec<PageRange>,
    /// Writable data of loaded objects, as of the last look.
    modules: hmm_mem::Vec<PageRange>,
    guesses: hmm_mem::Vec<Guess>,
}

/// A range that is a driver's, by all that is known.
struct Guess {
    whole: PageRange,
    /// What of it was not claimed.
    left: hmm_mem::Vec<PageRange>,
}

/// Forks of forks that can each have an engine.
const GENERATIONS: usize = 64;

/// One for each generation of forked processes; a process uses one of them.
static EXCLUDED: [Mutex<Lists>; GENERATIONS] = [const {
    Mutex::new(
        Rank::System,
        Lists {
            ranges: hmm_mem::vec(),
            modules: hmm_mem::vec(),
            guesses: hmm_mem::vec(),
        },
    )
}; GENERATIONS];
static GENERATION: AtomicUsize = AtomicUsize::new(0);

fn lists() -> MutexGuard<'static, Lists> {
    EXCLUDED[GENERATION.load(Ordering::Acquire)].lock()
}

/// In a forked child: begins with empty lists. What was excluded was memory of
/// threads that do not exist here, and of an engine that has stayed in the
/// parent; and one of its threads may have the lock.
///
/// # Panics
/// In the child of a child of ... [`GENERATIONS`] processes, each of which has
/// forked the next.
pub(crate) fn in_forked_child() {
    let generation = GENERATION.fetch_add(1, Ordering::AcqRel) + 1;
    assert!(
        generation < GENERATIONS,
        "more than {GENERATIONS} generations of forked processes"
    );
}

/// Keeps a range where it is: memory that a device or an engine thread needs
/// in order to work. Excluding one twice takes two [`include()`]s to undo.
pub fn exclude(range: PageRange) {
    lists().ranges.push(range);
}

/// Keeps a range where it is that is a driver's, as far as anybody can tell: it can be
/// the program's after all, or become that later. Then [`claim`] has a say.
pub fn exclude_guess(range: PageRange) {
    let mut left = hmm_mem::vec();
    left.push(range);
    let whole = range;
    lists().guesses.push(Guess { whole, left });
}

/// A kernel was given a pointer to this: it is the program's, whoever was thought to
/// own it.
pub fn claim(range: PageRange) {
    for Guess { left, .. } in &mut lists().guesses {
        if !left.iter().any(|part| part.overlaps(range)) {
            continue;
        }
        for part in std::mem::replace(left, hmm_mem::vec()) {
            let before = (part.start(), part.end().min(range.start()));
            let behind = (part.start().max(range.end()), part.end());
            let rest = [before, behind].into_iter();
            let rest = rest.filter(|(start, end)| start < end);
            left.extend(rest.map(|(start, end)| PageRange::span(start, end)));
        }
    }
}

/// The opposite of [`exclude`] and [`exclude_guess`], with the very same range, the older
/// one of two; ignores one that is not excluded.
pub fn include(range: PageRange) {
    let mut lists = lists();
    if let Some(index) = lists.ranges.iter().position(|&known| known == range) {
        lists.ranges.swap_remove(index);
        return;
    }
    let guess = lists.guesses.iter().position(|guess| guess.whole == range);
    if let Some(index) = guess {
        lists.guesses.remove(index);
    }
}

/// Looks again which objects are loaded; call it after dlopen(3), on a thread
/// that serves no faults: it takes the loader's lock.
pub fn refresh_modules() {
    let mut modules: hmm_mem::Vec<PageRange> = hmm_mem::vec();
    // SAFETY: the callback gets the pointer to `modules`, which lives on, and
    // is called on this thread before the call returns.
    unsafe {
        libc::dl_iterate_phdr(Some(note_module), (&raw mut modules).cast());
    }
    // The old list is freed after the lock is.
    std::mem::swap(&mut lists().modules, &mut modules);
}

unsafe extern "C" fn note_module(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    modules: *mut c_void,
) -> c_int {
    // SAFETY: the loader passes a valid structure, and `modules` is what
    // `refresh_modules` has passed.
    let (info, modules) = unsafe { (&*info, &mut *modules.cast::<hmm_mem::Vec<PageRange>>()) };
    if info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: the loader's table of that many entries.
    let segments = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    for segment in segments {
        if segment.p_type == libc::PT_LOAD && segment.p_flags & libc::PF_W != 0 {
            let start = VirtAddr::new(info.dlpi_addr.wrapping_add(segment.p_vaddr));
            if let Ok(range) = PageRange::covering(start, segment.p_memsz) {
                modules.push(range);
            }
        }
    }
    0
}

/// The first part of the range that is excluded as a whole, or not at all.
pub(crate) fn first_part(range: PageRange) -> (PageRange, bool) {
    let lists = lists();
    let arena = hmm_mem::arena_range();
    first_part_in(range, || {
        let guesses = lists.guesses.iter().flat_map(|guess| guess.left.iter());
        let lists = lists.ranges.iter().chain(lists.modules.iter());
        lists.chain(guesses).chain(arena.iter()).copied()
    })
}

/// The first part of the range that lies in the ranges as a whole, or not at
/// all.
pub(crate) fn first_part_in<I: Iterator<Item = PageRange>>(
    range: PageRange,
    all: impl Fn() -> I,
) -> (PageRange, bool) {
    let covering = |address| {
        all()
            .filter(move |known| known.contains(address))
            .map(PageRange::end)
            .max()
    };
    let (end, excluded) = match covering(range.start()) {
        Some(mut end) => {
            while let Some(further) = covering(end) {
                end = further;
            }
            (end, true)
        }
        None => {
            let next = all()
                .map(PageRange::start)
                .filter(|&start| start > range.start())
                .min();
            (next.unwrap_or(range.end()), false)
        }
    };
    (
        PageRange::span(range.start(), end.min(range.end())),
        excluded,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmm_types::PageCount;

    #[test]
    fn parts_alternate() {
        let page = |n: u64, pages| {
            PageRange::from_pages(VirtAddr::new(0x100_0000 + n * 4096), PageCount::new(pages))
        };
        for range in [page(2, 3), page(4, 2), page(6, 1), page(9, 1)] {
            exclude(range);
        }
        let mut rest = Some(page(0, 12));
        let mut parts = Vec::new();
        while let Some(range) = rest {
            let (part, excluded) = first_part(range);
            parts.push((part, excluded));
            rest = (part.end() < range.end()).then(|| PageRange::span(part.end(), range.end()));
        }
        assert_eq!(
            parts,
            [
                (page(0, 2), false),
                (page(2, 5), true),
                (page(7, 2), false),
                (page(9, 1), true),
                (page(10, 2), false)
            ]
        );
        for range in [page(2, 3), page(4, 2), page(6, 1), page(9, 1)] {
            include(range);
        }
        assert_eq!(first_part(page(0, 12)), (page(0, 12), false));
    }

    #[test]
    fn what_is_claimed_was_guessed_wrong() {
        let page = |n: u64, pages| {
            PageRange::from_pages(VirtAddr::new(0x200_0000 + n * 4096), PageCount::new(pages))
        };
        exclude(page(20, 1));
        exclude_guess(page(0, 10));
        exclude_guess(page(0, 10));
        assert_eq!(first_part(page(0, 12)), (page(0, 10), true));
        claim(page(4, 2));
        assert_eq!(first_part(page(0, 12)), (page(0, 4), true));
        assert_eq!(first_part(page(4, 12)), (page(4, 2), false));
        assert_eq!(first_part(page(6, 12)), (page(6, 4), true));
        // What is known is known, and each guess is taken back for itself.
        claim(page(20, 1));
        assert!(first_part(page(20, 1)).1);
        include(page(0, 10));
        assert_eq!(first_part(page(6, 12)), (page(6, 4), true));
        include(page(0, 10));
        assert_eq!(first_part(page(0, 12)), (page(0, 12), false));
        include(page(20, 1));
        assert!(!first_part(page(20, 1)).1);
    }

    #[test]
    fn what_is_guessed_again_outlives_the_first_guess() {
        let start = VirtAddr::new(0x300_0000);
        let all = PageRange::from_pages(start, PageCount::new(4));
        for claimed in [all, PageRange::from_pages(start, PageCount::new(1))] {
            exclude_guess(all);
            claim(claimed);
            assert!(!first_part(all).1);
            exclude_guess(all);
            include(all);
            assert_eq!(first_part(all), (all, true));
            include(all);
            assert_eq!(first_part(all), (all, false));
        }
    }

    #[test]
    fn statics_are_excluded() {
        static mut DATA: [u64; 1000] = [1; 1000];
        refresh_modules();
        let page = PageRange::page_of(VirtAddr::of(&raw const DATA)).unwrap();
        assert_eq!(first_part(page), (page, true));
    }
}
