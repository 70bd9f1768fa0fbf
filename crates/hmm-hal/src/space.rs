//! What the engine asks of an address space.

use hmm_types::{MemoryKind, PageCount, PageRange, Permissions, StayReason, VirtAddr};

use crate::{Event, SpaceId};

/// What this kernel and this user's privileges allow. Whatever is missing has
/// a slower or weaker substitute, which is counted when it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Pages can be moved (UFFDIO_MOVE, Linux 6.8). Else they are
    /// write-protected, copied and dropped.
    pub move_pages: bool,
    /// fork(2) is reported, so that children are served. Else everything must
    /// come home before a fork.
    pub fork_events: bool,
    /// Faults that the kernel itself takes inside of system calls are
    /// delivered. Else read(2) into a page on a device fails with EFAULT.
    pub kernel_faults: bool,
    /// Pages can be write-protected.
    pub write_protect: bool,
    /// Guards (MADV_GUARD_INSTALL) are told from pages.
    pub tells_guards: bool,
    /// Pages can be marked so that touching one raises SIGBUS (UFFDIO_POISON,
    /// Linux 6.6). Else the process ends where data is lost.
    pub poison: bool,
}

/// Address ranges of the engine's staging memory, registered like the
/// program's. Each is a whole number of 2 MiB slots and aligned to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagingLayout {
    /// Slots of 4 KiB pages.
    pub small: PageRange,
    /// Slots that hold a transparent huge page each; none where the machine
    /// has no THP.
    pub huge: Option<PageRange>,
}

/// One mapping of the process, as far as it overlaps what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The part of the mapping that was asked for.
    pub range: PageRange,
    /// All of the mapping, if nothing of it is the engine's; else the part.
    pub whole: PageRange,
    /// All of the mapping, whatever is in it.
    pub vma: PageRange,
    /// What backs it.
    pub kind: MemoryKind,
    /// How much one page of it is: a page, and more in hugetlbfs.
    pub page_len: PageCount,
    /// Memory of hugetlbfs that only this process has, in pages that can be
    /// write-protected, dropped and put back as a whole.
    pub huge_pages: bool,
    /// Memory that processes share through the library, so that the engine reaches
    /// every mapping of it: it can be write-protected, dropped and put back in all
    /// of them, but not moved.
    pub shared_region: bool,
    /// What it allows now.
    pub permissions: Permissions,
    /// Whether it is memory of the engine itself, or a loaded program's.
    pub engine_owned: bool,
    /// Whether it is memory of a thread that the kernel itself uses, and faults
    /// of the kernel are not served: see [`Capabilities::kernel_faults`].
    pub thread_memory: bool,
}

/// What the CPU's page table holds for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Nothing: never touched, dropped, or moved away.
    Hole,
    /// A page, in memory or swapped out; part of a huge page or not.
    Present {
        /// Mapped by a huge entry.
        huge: bool,
    },
    /// A guard (MADV_GUARD_INSTALL): touching it raises SIGSEGV. Kernels from
    /// before Linux 6.16 call it present.
    Guard,
}

/// What a device that mirrors the CPU's page table wants to know of a page that
/// is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuPage {
    /// Mapped by a huge entry.
    pub huge: bool,
    /// Of a gigabyte (hugetlbfs).
    pub gigantic: bool,
    /// The zero page.
    pub zero: bool,
    /// A write would change this very page, if the mapping allows writes: it
    /// is not shared copy-on-write, nor a file's page in a private mapping.
    pub own: bool,
}

/// Why an operation on several pages stopped before the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An event waits to be read: read it, then try again.
    Again,
    /// The page is pinned, or shared copy-on-write.
    Busy,
    /// The mapping's kind or flags rule the operation out.
    Incompatible,
    /// There is a page already where one was to be placed.
    Exists,
    /// There is no page where one was to be taken.
    Hole,
    /// Nothing is mapped there, or not registered.
    NotMapped,
    /// The process is gone.
    Gone,
    /// The kernel has no memory for it.
    NoMemory,
}

/// How far an operation on several pages came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pages done, from the start of the range.
    pub done: PageCount,
    /// What stopped it at the next page; `None` when all are done.
    pub stop: Option<Stop>,
}

/// Why a range could not be registered; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Another userfaultfd has registered part of the range.
    #[error("another userfaultfd owns part of the range; have it unregistered first")]
    Foreign,
    /// Part of the range is not mapped, or of a kind that cannot be registered.
    #[error("part of the range is not mapped, or cannot be registered")]
    Unsuitable,
    /// The process has as many mappings as it may, or no memory.
    #[error("the process may not have more mappings; raise vm.max_map_count")]
    Limit,
}

/// A system call failed in a way that has no meaning of its own here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operation} failed with error {errno}")]
pub struct SpaceError {
    /// What was tried.
    pub operation: &'static str,
    /// The kernel's error number.
    pub errno: i32,
}

/// How pages were dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// As the program drops some: with an event.
    Reported,
    /// Without one.
    Unreported,
}

/// The process's memory, as the engine works on it.
///
/// Unless a method says otherwise it does not wait for anything but the
/// kernel's own locks, does not allocate from the process heap and may be
/// called while the gate and a block are locked.
pub trait AddressSpace: Sync {
    /// What works here.
    fn capabilities(&self) -> Capabilities;

    /// Where staging memory lies. It never changes.
    fn staging(&self) -> StagingLayout;

    /// Visits the mappings that overlap `range`, in order. What is not visited
    /// is not mapped.
    ///
    /// # Errors
    /// When the kernel's map cannot be read.
    fn mappings(&self, range: PageRange, visit: &mut dyn FnMut(Mapping)) -> Result<(), SpaceError>;

    /// Visits what the page table holds for `range`, in order, as few spans as
    /// it likes; together they cover the range.
    ///
    /// # Errors
    /// When the kernel's page map cannot be read.
    fn presence(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, Presence),
    ) -> Result<(), SpaceError>;

    /// Says why [`AddressSpace::move_pages`] refused a page as
    /// [`Stop::Incompatible`]: `None` when the page can be copied instead
    /// (its protection or its flags differ), else the reason why it stays.
    fn explain_refusal(&self, page: PageRange) -> Option<StayReason>;

    /// Has faults and events of the range delivered from now on. The range may
    /// span several mappings. Already registered parts stay as they are.
    ///
    /// # Errors
    /// [`RegisterError`]; then nothing is registered that was not before.
    fn register(&self, range: PageRange) -> Result<(), RegisterError>;

    /// Whether pages may have been given back with MADV_FREE, and not been written
    /// since, before their memory was registered. Nobody tells of those, and the
    /// kernel takes them whenever it likes.
    fn may_have_freed_pages(&self) -> bool {
        false
    }

    /// The opposite of [`AddressSpace::register`]. Pages that are not present
    /// read as zeros afterwards.
    fn unregister(&self, range: PageRange);

    /// Visits the parts of the range that are registered now, in order. Slow:
    /// for what should not happen often.
    fn registered(&self, range: PageRange, visit: &mut dyn FnMut(PageRange));

    /// Moves pages to `to`. One of the two ranges is staging memory. Holes are
    /// skipped and count as done; which those are, ask
    /// [`AddressSpace::presence`] of the source before. Wakes nobody: the caller
    /// wakes when it holds no lock any more, or the woken thread could run in
    /// its place while others wait for the lock.
    ///
    /// A hole that meets a page counts as done, or stops with
    /// [`Stop::Exists`]: only move holes to where holes are.
    fn move_pages(&self, from: PageRange, to: VirtAddr) -> Progress;

    /// Visits the pages of a range that are there, as runs in order.
    ///
    /// # Errors
    /// When the kernel's tables cannot be read.
    fn cpu_pages(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, CpuPage),
    ) -> Result<(), SpaceError> {
        self.presence(range, &mut |span, presence| {
            if let Presence::Present { huge } = presence {
                let page = CpuPage {
                    gigantic: false,
                    huge,
                    zero: false,
                    own: true,
                };
                visit(span, page);
            }
        })
    }

    /// Places copies of `to.pages()` pages that begin at `from` (engine memory)
    /// at `to` in a space. Wakes nobody.
    fn copy_pages(&self, space: SpaceId, from: VirtAddr, to: PageRange) -> Progress;

    /// [`AddressSpace::copy_pages`], and wakes who waits for what was placed: one
    /// call where the kernel does both. Whoever is woken may fault again before
    /// the caller has let go of its locks.
    fn copy_pages_and_wake(&self, space: SpaceId, from: VirtAddr, to: PageRange) -> Progress {
        let progress = self.copy_pages(space, from, to);
        if progress.done > PageCount::ZERO {
            self.wake(space, to.slice(0, progress.done.get()));
        }
        progress
    }

    /// Places zeroed pages. Wakes nobody.
    fn zero_pages(&self, space: SpaceId, range: PageRange) -> Progress;

    /// Marks pages whose data is lost: touching one raises SIGBUS instead of
    /// giving zeros. Stops with [`Stop::Incompatible`] where the kernel cannot
    /// (before Linux 6.6).
    fn poison_pages(&self, space: SpaceId, range: PageRange) -> Progress;

    /// Wakes threads that wait for a page of the range; they look again.
    fn wake(&self, space: SpaceId, range: PageRange);

    /// Stops (or allows again) writes to the pages of the range.
    fn write_protect(&self, range: PageRange, on: bool) -> Progress;

    /// Whether there is a page and nobody can write to it: surely not a hole, nor a
    /// protection that is left of a page. May say no although it is so.
    fn is_protected(&self, _page: VirtAddr) -> bool {
        false
    }

    /// Allows writes to the pages of the range again in any space: a forked
    /// child inherits a protection that its parent's engine had set. Wakes who
    /// waits to write.
    fn allow_writes(&self, space: SpaceId, range: PageRange) -> Progress;

    /// Copies pages of the program to `to` (engine memory of the same length).
    /// Stops with [`Stop::NotMapped`] instead of raising a signal. May wait for
    /// a fault to be served: call it without any lock, and never on a thread
    /// that reads events.
    fn read_pages(&self, from: PageRange, to: VirtAddr) -> Progress;

    /// Drops the pages of a range, which lies in one mapping. Reports its own
    /// [`crate::Event::Remove`] and waits until that is read, or says that it has
    /// not: call it without any lock, and never on a thread that reads events.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn discard(&self, range: PageRange) -> Result<Dropped, SpaceError>;

    /// Gives the process its own copy of pages that it shares copy-on-write.
    /// May fault: call it without any lock, and never on a thread that reads
    /// events.
    ///
    /// # Errors
    /// When the kernel refuses, or pages are gone.
    fn unshare(&self, range: PageRange) -> Result<(), SpaceError>;

    /// Fills one whole empty staging slot with fresh pages of its kind. False
    /// when the kernel has no memory for it. Slow; not for the fault path.
    fn provision(&self, slot: PageRange) -> bool;

    /// Reads an event if one is there; does not wait. The caller holds the gate
    /// for writing: a thread that changed the address space goes on when its
    /// event has been read. One at a time, since what an event means can depend
    /// on what is done before the next one is read.
    fn read_event(&self) -> Option<Event>;

    /// Called with the gate held by whoever has read that `mover` was remapped
    /// to `target`, which according to the events was not free: a thread that
    /// has taken something away from there is about to say so. Waits until its
    /// event is in the queue, a bounded time; false when it was not found. As
    /// long as nothing else is read, the thread that remapped cannot go on and
    /// change its memory again.
    fn await_change(&self, target: PageRange, mover: PageRange) -> bool;

    /// Whether every change of the own space's mappings that has begun was also
    /// read as an event.
    fn is_quiet(&self) -> bool;

    /// Visits the ranges whose pages a forked child does not see
    /// (MADV_WIPEONFORK): it reads zeros there.
    fn wiped_on_fork(&self, _visit: &mut dyn FnMut(PageRange)) {}

    /// Lets a child space go: all of its pages are its own now.
    fn release(&self, space: SpaceId);

    /// Called without locks by whoever met [`Stop::Again`] and cannot read the
    /// event itself: lets others run.
    fn relax(&self);

    /// Whether a thread that waits may sleep until another one wakes it. A
    /// simulator has but one thread: there, who waits calls
    /// [`AddressSpace::relax`] instead.
    fn may_sleep(&self) -> bool {
        true
    }
}
