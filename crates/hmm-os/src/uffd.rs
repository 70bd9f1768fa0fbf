//! One userfaultfd context.
//!
//! MOVE, COPY and ZEROPAGE report how far they came: the call fails with
//! EAGAIN and tells the bytes done. Here they go on with the rest until all is
//! done or the next page itself is refused, and that refusal becomes a
//! [`Stop`], once, in this file.
//!
//! The kernel also refuses a range that runs over the end of a mapping, with
//! the same errors as for a mapping that does not fit at all. Such a refusal is
//! retried with half the range, so that what is reported is always about one
//! page.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use hmm_hal::{Presence, Progress, RegisterError, Stop};
use hmm_types::{PAGE_SIZE, PageCount, PageRange, USER_END, VirtAddr};
use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, Result};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::abi;
use crate::fatal::fail;
use crate::pagemap::Pagemap;

/// Every feature this project knows, with the kernel's name for it.
pub(crate) const FEATURES: [(u64, &str); 17] = [
    (
        raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64,
        "PAGEFAULT_FLAG_WP",
    ),
    (raw::UFFD_FEATURE_EVENT_FORK as u64, "EVENT_FORK"),
    (raw::UFFD_FEATURE_EVENT_REMAP as u64, "EVENT_REMAP"),
    (raw::UFFD_FEATURE_EVENT_REMOVE as u64, "EVENT_REMOVE"),
    (
        raw::UFFD_FEATURE_MISSING_HUGETLBFS as u64,
        "MISSING_HUGETLBFS",
    ),
    (raw::UFFD_FEATURE_MISSING_SHMEM as u64, "MISSING_SHMEM"),
    (raw::UFFD_FEATURE_EVENT_UNMAP as u64, "EVENT_UNMAP"),
    (raw::UFFD_FEATURE_SIGBUS as u64, "SIGBUS"),
    (raw::UFFD_FEATURE_THREAD_ID as u64, "THREAD_ID"),
    (raw::UFFD_FEATURE_MINOR_HUGETLBFS as u64, "MINOR_HUGETLBFS"),
    (raw::UFFD_FEATURE_MINOR_SHMEM as u64, "MINOR_SHMEM"),
    (raw::UFFD_FEATURE_EXACT_ADDRESS as u64, "EXACT_ADDRESS"),
    (
        raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64,
        "WP_HUGETLBFS_SHMEM",
    ),
    (raw::UFFD_FEATURE_WP_UNPOPULATED as u64, "WP_UNPOPULATED"),
    (raw::UFFD_FEATURE_POISON as u64, "POISON"),
    (raw::UFFD_FEATURE_WP_ASYNC as u64, "WP_ASYNC"),
    (raw::UFFD_FEATURE_MOVE as u64, "MOVE"),
];

pub(crate) const FEATURE_WP: u64 = raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64;
pub(crate) const FEATURE_FORK: u64 = raw::UFFD_FEATURE_EVENT_FORK as u64;
/// hugetlbfs: pages can be missed and write-protected.
pub(crate) const FEATURES_HUGETLB: u64 =
    raw::UFFD_FEATURE_MISSING_HUGETLBFS as u64 | raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64;
/// Shared memory: pages can be missed and write-protected.
pub(crate) const FEATURES_SHARED: u64 =
    raw::UFFD_FEATURE_MISSING_SHMEM as u64 | raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64;
/// hugetlbfs that is shared: whether there is a page can be asked of a peer's mapping.
pub(crate) const FEATURE_MINOR_HUGETLB: u64 = raw::UFFD_FEATURE_MINOR_HUGETLBFS as u64;
pub(crate) const FEATURE_MOVE: u64 = raw::UFFD_FEATURE_MOVE as u64;
pub(crate) const FEATURE_POISON: u64 = raw::UFFD_FEATURE_POISON as u64;
/// Without these a mapping could change unseen, and data be lost.
pub(crate) const FEATURES_NEEDED: u64 = raw::UFFD_FEATURE_EVENT_REMAP as u64
    | raw::UFFD_FEATURE_EVENT_REMOVE as u64
    | raw::UFFD_FEATURE_EVENT_UNMAP as u64;
pub(crate) const FEATURES_WANTED: u64 = FEATURES_NEEDED
    | FEATURE_WP
    | FEATURE_FORK
    | FEATURE_MOVE
    | FEATURES_HUGETLB
    | FEATURES_SHARED
    | FEATURE_POISON
    | raw::UFFD_FEATURE_THREAD_ID as u64;

/// How a context was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Faults of the kernel on the program's behalf are delivered as well.
    Full,
    /// Only faults of user-mode instructions.
    UserMode,
}

/// A descriptor on which the API handshake has not been made.
pub(crate) fn open_descriptor(reach: Reach) -> Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    if reach == Reach::UserMode {
        let user_mode = UserfaultfdFlags::from_bits_retain(raw::UFFD_USER_MODE_ONLY);
        // SAFETY: a new context observes nothing until ranges are registered.
        return unsafe { userfaultfd(flags | user_mode) };
    }
    // SAFETY: as above.
    match unsafe { userfaultfd(flags) } {
        Err(Errno::PERM) => {
            let device = open(
                c"/dev/userfaultfd",
                OFlags::CLOEXEC | OFlags::RDWR,
                Mode::empty(),
            )?;
            let argument = std::ptr::without_provenance_mut::<u8>(flags.bits() as usize);
            // SAFETY: this request takes its flags in place of a pointer and
            // returns a new descriptor, which nobody else owns.
            unsafe {
                let number = libc::ioctl(
                    std::os::fd::AsRawFd::as_raw_fd(&device),
                    abi::USERFAULTFD_IOC_NEW.into(),
                    argument,
                );
                if number < 0 {
                    return Err(Errno::PERM);
                }
                Ok(OwnedFd::from_raw_fd(number))
            }
        }
        result => result,
    }
}

/// Makes the handshake on a new descriptor; returns what the kernel offers.
pub(crate) fn handshake(fd: BorrowedFd<'_>, features: u64) -> Result<u64> {
    let mut api = abi::uffdio_api {
        api: raw::UFFD_API.into(),
        features,
        ioctls: 0,
    };
    // SAFETY: the structure is the one that UFFDIO_API takes.
    unsafe { abi::ioctl(fd, abi::UFFDIO_API, &mut api) }?;
    Ok(api.features)
}

/// A context that is ready for use.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
    features: u64,
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Uffd {
    /// A context with as many of the `wanted` features as are offered and
    /// allowed. A first handshake on a descriptor that is thrown away asks
    /// what is offered, for one that asks for too much fails.
    pub(crate) fn open(reach: Reach, wanted: u64) -> Result<Self> {
        let offered = handshake(open_descriptor(reach)?.as_fd(), 0)?;
        let mut features = offered & wanted;
        loop {
            let fd = open_descriptor(reach)?;
            match handshake(fd.as_fd(), features) {
                Ok(_) => return Ok(Self { fd, features }),
                // Only the privileged may watch forks.
                Err(Errno::PERM) if features & FEATURE_FORK != 0 => features &= !FEATURE_FORK,
                Err(error) => return Err(error),
            }
        }
    }

    /// The context of a forked child, as a fork event delivered it.
    pub(crate) fn of_child(fd: OwnedFd, features: u64) -> Self {
        Self { fd, features }
    }

    pub(crate) const fn features(&self) -> u64 {
        self.features
    }

    pub(crate) fn register(
        &self,
        range: PageRange,
        write_protect: bool,
    ) -> core::result::Result<(), RegisterError> {
        let wp = if write_protect {
            raw::UFFDIO_REGISTER_MODE_WP
        } else {
            0
        };
        self.register_for(range, raw::UFFDIO_REGISTER_MODE_MISSING | wp)
    }

    /// Registers shared memory that is registered already so that
    /// [`Uffd::map_existing`] works on it.
    pub(crate) fn register_minor(
        &self,
        range: PageRange,
    ) -> core::result::Result<(), RegisterError> {
        let all = raw::UFFDIO_REGISTER_MODE_MISSING
            | raw::UFFDIO_REGISTER_MODE_WP
            | raw::UFFDIO_REGISTER_MODE_MINOR;
        self.register_for(range, all)
    }

    fn register_for(&self, range: PageRange, mode: u32) -> core::result::Result<(), RegisterError> {
        let mut argument = abi::uffdio_register {
            range: raw_range(range),
            mode: mode.into(),
            ioctls: 0,
        };
        // SAFETY: registering is the act that changes what a load does; the
        // caller serves the faults from now on (see the crate's page).
        match unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_REGISTER, &mut argument) } {
            Ok(_) => Ok(()),
            Err(Errno::BUSY) => Err(RegisterError::Foreign),
            Err(Errno::NOMEM) => Err(RegisterError::Limit),
            Err(_) => Err(RegisterError::Unsuitable),
        }
    }

    pub(crate) fn unregister(&self, range: PageRange) -> Result<()> {
        let mut argument = raw_range(range);
        // SAFETY: the caller has brought home what the range held.
        unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_UNREGISTER, &mut argument) }.map(drop)
    }

    /// Moves pages; holes count as done. Wakes nobody. `own` is the side that
    /// nobody else changes meanwhile: where pages have moved to, that was empty, or
    /// where they came from, that had them all.
    pub(crate) fn move_pages(
        &self,
        from: PageRange,
        to: VirtAddr,
        own: Side,
        pagemap: &Pagemap,
    ) -> Progress {
        let progress = advance(from.pages(), |first, pages| {
            let mut argument = abi::uffdio_move {
                dst: to.plus_pages(first).get(),
                src: from.start().plus_pages(first).get(),
                len: pages * PAGE_SIZE,
                mode: abi::MOVE_MODE_ALLOW_SRC_HOLES | abi::MOVE_MODE_DONTWAKE,
                move_: 0,
            };
            // SAFETY: one of the ranges is staging memory and the other one is
            // tracked by core, which decided that its pages go.
            let result = unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_MOVE, &mut argument) };
            let mut step = step(pages, argument.move_, result);
            // At once: the next call may be refused for another reason.
            if step.error == Some(Errno::EXIST) || step.error.is_some() && step.done > 0 {
                let first = first + step.done;
                let rest = match own {
                    Side::From => from.slice(first, pages - step.done),
                    Side::To => {
                        let pages = PageCount::new(pages - step.done);
                        PageRange::from_pages(to.plus_pages(first), pages)
                    }
                };
                step.done += uncounted(pagemap, rest, own);
            }
            step
        });
        self.wake_after(progress, to);
        progress
    }

    /// Places copies of the pages at `from`. Wakes nobody.
    pub(crate) fn copy(&self, from: VirtAddr, to: PageRange) -> Progress {
        self.copy_as(from, to, abi::COPY_MODE_DONTWAKE)
    }

    /// Places copies of the pages at `from`, and wakes who waits for them.
    pub(crate) fn copy_and_wake(&self, from: VirtAddr, to: PageRange) -> Progress {
        self.copy_as(from, to, 0)
    }

    fn copy_as(&self, from: VirtAddr, to: PageRange, mode: u64) -> Progress {
        let progress = advance(to.pages(), |first, pages| {
            let mut argument = abi::uffdio_copy {
                dst: to.start().plus_pages(first).get(),
                src: from.plus_pages(first).get(),
                len: pages * PAGE_SIZE,
                mode,
                copy: 0,
            };
            // SAFETY: only holes of a registered range are filled; the kernel
            // checks that the source can be read.
            let result = unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_COPY, &mut argument) };
            step(pages, argument.copy, result)
        });
        self.wake_after(progress, to.start());
        progress
    }

    /// Places zeroed pages. Wakes nobody.
    pub(crate) fn zero(&self, range: PageRange) -> Progress {
        let progress = advance(range.pages(), |first, pages| {
            let mut argument = abi::uffdio_zeropage {
                range: raw_range(range.slice(first, pages)),
                mode: abi::ZEROPAGE_MODE_DONTWAKE,
                zeropage: 0,
            };
            // SAFETY: only holes of a registered range are filled.
            let result = unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_ZEROPAGE, &mut argument) };
            step(pages, argument.zeropage, result)
        });
        self.wake_after(progress, range.start());
        progress
    }

    /// Maps a page that the file has; false when it has none.
    pub(crate) fn map_existing(&self, page: PageRange) -> bool {
        let mut argument = abi::uffdio_continue {
            range: raw_range(page),
            mode: 0,
            mapped: 0,
        };
        // SAFETY: nothing but a page of the mapping's own file is mapped.
        let result = unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_CONTINUE, &mut argument) };
        matches!(result, Ok(_) | Err(Errno::EXIST))
    }

    /// Marks holes so that touching one raises SIGBUS.
    pub(crate) fn poison(&self, range: PageRange) -> Progress {
        let progress = advance(range.pages(), |first, pages| {
            let mut argument = abi::uffdio_poison {
                range: raw_range(range.slice(first, pages)),
                mode: 0,
                updated: 0,
            };
            // SAFETY: only holes of a registered range are marked.
            let result = unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_POISON, &mut argument) };
            step(pages, argument.updated, result)
        });
        self.wake_after(progress, range.start());
        progress
    }

    /// The same where a protection may have been left behind, which the kernel takes
    /// for a page.
    pub(crate) fn poison_protected(&self, range: PageRange) -> Progress {
        match self.write_protect(range, false) {
            Progress { stop: None, .. } => self.poison(range),
            refused => refused,
        }
    }

    /// Does something to all pages of a range, of this size, that allow it, whatever
    /// the others are: parts of it may not be mapped, or have been done already. True
    /// when it has to be done again, after an event has been read.
    pub(crate) fn wherever_possible(
        &self,
        range: PageRange,
        page: PageCount,
        call: impl Fn(&Self, PageRange) -> Progress,
    ) -> bool {
        let mut from = range.start();
        while from < range.end() {
            let progress = call(self, PageRange::span(from, range.end()));
            match progress.stop {
                None | Some(Stop::Gone) => return false,
                Some(Stop::Again) => return true,
                Some(_) => from = from.plus_pages(progress.done.get() + page.get()),
            }
        }
        false
    }

    /// Stops or allows writes. The call tells no progress, but doing it twice
    /// does no harm.
    pub(crate) fn write_protect(&self, range: PageRange, on: bool) -> Progress {
        advance(range.pages(), |first, pages| {
            let mut argument = abi::uffdio_writeprotect {
                range: raw_range(range.slice(first, pages)),
                mode: if on { abi::WRITEPROTECT_MODE_WP } else { 0 },
            };
            // SAFETY: the caller serves write faults on the range.
            let result =
                unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_WRITEPROTECT, &mut argument) };
            step(pages, 0, result)
        })
    }

    /// Wakes who waits for a page of the range; a space that is gone has nobody.
    pub(crate) fn wake(&self, range: PageRange) {
        let mut argument = raw_range(range);
        // SAFETY: a woken thread looks at the page again; nothing else changes.
        let _ = unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_WAKE, &mut argument) };
    }

    /// A page that is there already was placed by somebody else; whoever
    /// waited for it may have missed that wake-up and would sleep for ever.
    fn wake_after(&self, progress: Progress, start: VirtAddr) {
        if progress.stop == Some(Stop::Exists) {
            let page = start.plus_pages(progress.done.get());
            self.wake(PageRange::from_pages(page, PageCount::ONE));
        }
    }

    /// Whether the space's process has exited or called exec: the kernel sends
    /// no message about that, but says ESRCH to whoever asks for something.
    pub(crate) fn is_gone(&self) -> bool {
        // The last page of user space, where no program maps anything.
        let page = PageRange::from_pages(VirtAddr::new(USER_END - PAGE_SIZE), PageCount::ONE);
        let mut argument = abi::uffdio_writeprotect {
            range: raw_range(page),
            mode: abi::WRITEPROTECT_MODE_DONTWAKE,
        };
        // SAFETY: allowing writes to a page that is not registered is refused;
        // only the reason for the refusal matters.
        let result = unsafe { abi::ioctl(self.as_fd(), abi::UFFDIO_WRITEPROTECT, &mut argument) };
        result == Err(Errno::SRCH)
    }

    /// Reads the messages that are there; does not wait.
    pub(crate) fn read<'a>(
        &self,
        buffer: &'a mut [MaybeUninit<abi::uffd_msg>],
    ) -> Result<&'a [abi::uffd_msg]> {
        // SAFETY: MaybeUninit<u8> is valid for every byte, and only what the
        // kernel has filled is looked at.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(
                buffer.as_mut_ptr().cast::<MaybeUninit<u8>>(),
                size_of_val(buffer),
            )
        };
        let (filled, _) = rustix::io::read(&self.fd, bytes)?;
        let count = filled.len() / size_of::<abi::uffd_msg>();
        // SAFETY: the kernel has filled `count` whole messages, which are plain
        // numbers, valid whatever the bytes.
        Ok(unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast(), count) })
    }
}

/// One end of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    From,
    To,
}

/// How many pages have moved although the kernel says that it met others in
/// their place.
///
/// Linux 6.18 moves pages in batches (mm/userfaultfd.c, `move_pages`). When it
/// has had to try a page again, because the page was locked for a moment, it
/// moves the batch that begins there but does not count it, tries the same page
/// once more, and finds the one it has just moved in the way. So what is there
/// tells: pages where there was none, or none where there were pages.
///
/// Only on the side that is the engine's own. The other one is the program's,
/// which may have remapped or dropped what has come home before this looks.
fn uncounted(pagemap: &Pagemap, rest: PageRange, own: Side) -> u64 {
    let mut moved = 0;
    let seen = pagemap.visit(rest, &mut |span, presence| {
        let there = matches!(presence, Presence::Present { .. });
        if there == (own == Side::To) && span.start() == rest.start().plus_pages(moved) {
            moved += span.pages().get();
        }
    });
    if let Err(error) = seen {
        fail(format_args!(
            "cannot tell which pages the kernel has moved, by what is at {rest} ({error}); going \
             on could lose them, so the process ends now"
        ));
    }
    moved
}

fn raw_range(range: PageRange) -> abi::uffdio_range {
    abi::uffdio_range {
        start: range.start().get(),
        len: range.bytes().get(),
    }
}

/// What one call achieved: pages done, and the error that ended it.
struct Step {
    done: u64,
    error: Option<Errno>,
}

fn step(asked_pages: u64, done_bytes: i64, result: Result<i32>) -> Step {
    match result {
        Ok(_) => Step {
            done: asked_pages,
            error: None,
        },
        Err(error) => Step {
            // A negative count is the error once more.
            done: u64::try_from(done_bytes).map_or(0, |bytes| (bytes / PAGE_SIZE).min(asked_pages)),
            error: Some(error),
        },
    }
}

/// Calls `call(first page, pages)` until all pages are done or one is refused.
/// Between two calls that achieve something the range is halved, so there are
/// at most log2(pages) calls without progress in a row.
fn advance(pages: PageCount, mut call: impl FnMut(u64, u64) -> Step) -> Progress {
    let pages = pages.get();
    let mut done = 0;
    let mut limit = pages;
    while done < pages {
        let asked = limit.min(pages - done);
        let Step { done: more, error } = call(done, asked);
        done += more;
        match error {
            None => limit = limit.saturating_mul(2),
            // Ask for the rest to learn what stopped it, and whether it still does.
            Some(_) if more > 0 => {}
            // Perhaps the range only runs over the end of a mapping.
            Some(Errno::INVAL | Errno::NOENT) if asked > 1 => limit = asked / 2,
            Some(error) => {
                return Progress {
                    done: PageCount::new(done),
                    stop: Some(meaning(error)),
                };
            }
        }
    }
    Progress {
        done: PageCount::new(done),
        stop: None,
    }
}

/// What an error of a resolving call says about the page.
fn meaning(error: Errno) -> Stop {
    match error {
        Errno::AGAIN | Errno::INTR => Stop::Again,
        Errno::BUSY => Stop::Busy,
        Errno::EXIST => Stop::Exists,
        // Holes are allowed where pages are taken, so what is missing is the
        // mapping itself; EFAULT is a source that is not mapped.
        Errno::NOENT | Errno::FAULT => Stop::NotMapped,
        Errno::SRCH => Stop::Gone,
        Errno::NOMEM => Stop::NoMemory,
        _ => Stop::Incompatible,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel in which page `bad` is refused with `error`, which does
    /// at most `burst` pages a call and none of a range that crosses `edge`.
    fn model(bad: u64, error: Errno, burst: u64, edge: u64) -> impl FnMut(u64, u64) -> Step {
        move |first, pages| {
            if first < edge && first + pages > edge {
                return Step {
                    done: 0,
                    error: Some(Errno::INVAL),
                };
            }
            let possible = bad.saturating_sub(first).min(burst).min(pages);
            if possible == pages {
                return Step {
                    done: pages,
                    error: None,
                };
            }
            Step {
                done: possible,
                error: Some(if possible > 0 { Errno::AGAIN } else { error }),
            }
        }
    }

    #[test]
    fn every_prefix_is_found() {
        for edge in [0, 1, 3, 300, 512] {
            for bad in [0, 1, 2, 17, 511, 512] {
                for error in [Errno::BUSY, Errno::INVAL, Errno::NOENT] {
                    let progress = advance(PageCount::new(512), model(bad, error, 60, edge));
                    assert_eq!(progress.done.get(), bad, "edge {edge} {error:?}");
                    let stop = (bad < 512).then(|| meaning(error));
                    assert_eq!(progress.stop, stop);
                }
            }
        }
    }

    #[test]
    fn a_pending_event_stops_at_once() {
        let mut calls = 0;
        let progress = advance(PageCount::new(512), |_, _| {
            calls += 1;
            Step {
                done: 0,
                error: Some(Errno::AGAIN),
            }
        });
        assert_eq!(
            (progress.done, progress.stop, calls),
            (PageCount::ZERO, Some(Stop::Again), 1)
        );
    }
}
