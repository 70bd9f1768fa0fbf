//! What the tests on the real kernel share.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hmm_hal::{AddressSpace, Event, Presence, Progress, Stop};
use hmm_os::{Disable, LinuxSpace, OpenConfig, StagingConfig, Wakeup};
use hmm_types::{BLOCK_SIZE, PageCount, PageRange, VirtAddr};

pub const PAGE: usize = 4096;

/// One test at a time: a fork reports to every context of the process, and
/// waits until each has read it.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub struct Fixture {
    pub space: LinuxSpace,
    _turn: MutexGuard<'static, ()>,
}

pub fn my_turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

pub const CONFIG: OpenConfig = OpenConfig {
    staging: StagingConfig {
        small_bytes: 16 << 20,
        huge_bytes: 16 << 20,
    },
    disable: Disable {
        move_pages: false,
        pagemap_scan: false,
        procmap_query: false,
        fork_events: false,
        write_protect: false,
        privileged: false,
    },
};

/// An open space, or `None` with a line that says what is skipped and why.
pub fn open() -> Option<Fixture> {
    open_without(Disable::default())
}

pub fn open_without(disable: Disable) -> Option<Fixture> {
    let turn = my_turn();
    match LinuxSpace::open(OpenConfig { disable, ..CONFIG }) {
        Ok(space) => Some(Fixture { space, _turn: turn }),
        Err(error) => {
            println!("SKIPPED: {error}");
            None
        }
    }
}

impl Fixture {
    /// Says visibly that the machine lacks something.
    pub fn lacks(&self, missing: bool, what: &str) -> bool {
        if missing {
            println!("SKIPPED: no {what} here");
        }
        missing
    }

    /// Says that pages cannot be moved here (before Linux 6.8).
    pub fn lacks_move(&self) -> bool {
        self.lacks(!self.space.capabilities().move_pages, "UFFDIO_MOVE")
    }

    /// A slot of 4 KiB staging pages.
    pub fn small_slot(&self, index: u64) -> PageRange {
        self.space.staging().small.slice(index * 512, 512)
    }

    /// Waits for the next events and reads them.
    pub fn next_events(&self) -> Vec<Event> {
        for _ in 0..100 {
            if self.space.wait(Some(100)) == Wakeup::Events {
                let events: Vec<_> = std::iter::from_fn(|| self.space.read_event()).collect();
                if !events.is_empty() {
                    return events;
                }
            }
        }
        panic!("no event within ten seconds");
    }

    /// Unmaps registered pages: that waits until the event is read.
    pub fn unmap(&self, area: &Area, first: usize, pages: usize) {
        std::thread::scope(|scope| {
            scope.spawn(|| area.unmap(first, pages));
            assert!(matches!(self.next_events()[..], [Event::Unmap { .. }]));
        });
    }

    pub fn presence(&self, range: PageRange) -> Vec<(PageRange, Presence)> {
        let mut spans = Vec::new();
        self.space
            .presence(range, &mut |span, presence| spans.push((span, presence)))
            .unwrap();
        let mut next = range.start();
        for (span, _) in &spans {
            assert_eq!(span.start(), next, "spans cover the range in order");
            next = span.end();
        }
        assert_eq!(next, range.end());
        spans
    }

    pub fn all_are(&self, range: PageRange, expected: Presence) -> bool {
        self.presence(range)
            .iter()
            .all(|&(_, presence)| presence == expected)
    }
}

pub const SMALL: Presence = Presence::Present { huge: false };
pub const HUGE: Presence = Presence::Present { huge: true };

pub fn done(pages: u64) -> Progress {
    Progress {
        done: PageCount::new(pages),
        stop: None,
    }
}

pub fn stopped(pages: u64, stop: Stop) -> Progress {
    Progress {
        done: PageCount::new(pages),
        stop: Some(stop),
    }
}

/// Anonymous memory that begins at a 2 MiB boundary.
pub struct Area {
    base: *mut u8,
    pub range: PageRange,
}

// SAFETY: an address; the tests order their accesses.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    pub fn new(pages: usize, huge: bool) -> Self {
        Self::map(pages, huge, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    pub fn map(pages: usize, huge: bool, flags: i32, file: i32) -> Self {
        let block = usize::try_from(BLOCK_SIZE).unwrap();
        let len = pages * PAGE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: reserves address space, and replaces part of it by the area.
        let base = unsafe {
            let room = libc::mmap(
                ptr::null_mut(),
                len + 2 * block,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            assert_ne!(room, libc::MAP_FAILED);
            let start = room.wrapping_byte_add(room.addr().next_multiple_of(block) - room.addr());
            let base = libc::mmap(start, len, access, flags | libc::MAP_FIXED, file, 0);
            assert_ne!(base, libc::MAP_FAILED);
            if flags & libc::MAP_ANONYMOUS != 0 {
                let advice = if huge {
                    libc::MADV_HUGEPAGE
                } else {
                    libc::MADV_NOHUGEPAGE
                };
                libc::madvise(base, len, advice);
            }
            base.cast::<u8>()
        };
        let range = PageRange::new(VirtAddr::of(base), len as u64).unwrap();
        Self { base, range }
    }

    pub fn ptr(&self, page: usize) -> *mut u8 {
        self.base.wrapping_add(page * PAGE)
    }

    /// The page's first word.
    pub fn get(&self, page: usize) -> u64 {
        load(self.range.start().plus_pages(page as u64))
    }

    pub fn set(&self, page: usize, value: u64) {
        // SAFETY: a word of the area.
        unsafe { self.ptr(page).cast::<u64>().write_volatile(value) }
    }

    pub fn fill(&self) {
        (0..self.range.pages().index()).for_each(|page| self.set(page, tag(page)));
    }

    pub fn check(&self) {
        (0..self.range.pages().index())
            .for_each(|page| assert_eq!(self.get(page), tag(page), "page {page}"));
    }

    pub fn page(&self, page: u64) -> PageRange {
        self.range.slice(page, 1)
    }

    pub fn protect(&self, first: usize, pages: usize, access: i32) {
        // SAFETY: part of the area.
        let result = unsafe { libc::mprotect(self.ptr(first).cast(), pages * PAGE, access) };
        assert_eq!(result, 0);
    }

    pub fn unmap(&self, first: usize, pages: usize) {
        // SAFETY: part of the area, which the test does not use again.
        let result = unsafe { libc::munmap(self.ptr(first).cast(), pages * PAGE) };
        assert_eq!(result, 0);
    }

    pub fn advise(&self, advice: i32) {
        // SAFETY: the whole area; the tests give advice that keeps its content.
        let result =
            unsafe { libc::madvise(self.base.cast(), self.range.pages().index() * PAGE, advice) };
        assert_eq!(result, 0);
    }

    pub fn lock(&self) -> bool {
        // SAFETY: the whole area.
        unsafe { libc::mlock(self.base.cast(), self.range.pages().index() * PAGE) == 0 }
    }
}

/// What a filled area has in a page.
pub fn tag(page: usize) -> u64 {
    0x5EED_0000_0000 + page as u64
}

/// Reads a word of memory that is mapped.
pub fn load(address: VirtAddr) -> u64 {
    // SAFETY: the tests name areas and filled staging slots only.
    unsafe { ptr::with_exposed_provenance::<u64>(address.addr()).read_volatile() }
}

/// Forks; the child runs `body` and exits with its result.
pub fn fork(body: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the body makes system calls and touches the tests' areas only.
    match unsafe { libc::fork() } {
        // SAFETY: ends the child without running the test program's own exit.
        0 => unsafe { libc::_exit(body()) },
        child => {
            assert!(child > 0);
            child
        }
    }
}

/// Waits for a child, and returns its exit status.
pub fn reap(child: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: writes the status.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        -libc::WTERMSIG(status)
    }
}

pub fn kill(child: libc::pid_t) {
    // SAFETY: a child of the test's own.
    unsafe { libc::kill(child, libc::SIGKILL) };
    reap(child);
}
