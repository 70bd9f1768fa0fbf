//! Contexts of forked children.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use hmm_hal::SpaceId;
use hmm_sync::{Rank, RwLock};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use crate::abi::uffd_msg;
use crate::fatal::fail;
use crate::uffd::Uffd;

/// Children whose pages the engine can hold at a time. One more cannot be
/// served, and would read zeros where its data was: the process ends instead.
pub const MAX_CHILDREN: usize = 1024;
/// Children that are looked at for having exited, at a time.
const PROBES: usize = 16;
/// Key of the interrupt and the nudge in the set of descriptors to wait for;
/// children have their space's number, which is never 0.
const NOBODY: u64 = 0;

#[derive(Debug)]
struct Child {
    uffd: Uffd,
    exit_reported: bool,
}

/// The children, and one descriptor that becomes readable with any of them.
#[derive(Debug)]
pub(crate) struct Children {
    /// Slot `n` is space `n + 1`. The lock keeps a descriptor open while it is
    /// used; slots are filled by the reader and emptied by `release`.
    slots: RwLock<hmm_mem::Vec<Option<Child>>>,
    count: AtomicUsize,
    /// Where the search for a free slot begins: a number that was given back is
    /// given out again as late as possible, since a fault that was read before
    /// may still name it.
    next_slot: AtomicUsize,
    next_probe: AtomicUsize,
    poll: OwnedFd,
    interrupt: OwnedFd,
    nudge: OwnedFd,
}

impl Children {
    pub(crate) fn new() -> rustix::io::Result<Self> {
        let mut slots = hmm_mem::vec_with_capacity(MAX_CHILDREN);
        slots.resize_with(MAX_CHILDREN, || None);
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        let bell = || {
            let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            epoll::add(&poll, &bell, EventData::new_u64(NOBODY), EventFlags::IN)?;
            Ok(bell)
        };
        let (interrupt, nudge) = (bell()?, bell()?);
        Ok(Self {
            slots: RwLock::new(Rank::System, slots),
            count: AtomicUsize::new(0),
            next_slot: AtomicUsize::new(0),
            next_probe: AtomicUsize::new(0),
            poll,
            interrupt,
            nudge,
        })
    }

    /// Readable when a child's context, the interrupt or the nudge is.
    pub(crate) fn poll_descriptor(&self) -> &OwnedFd {
        &self.poll
    }

    pub(crate) fn interrupt_descriptor(&self) -> &OwnedFd {
        &self.interrupt
    }

    pub(crate) fn nudge_descriptor(&self) -> &OwnedFd {
        &self.nudge
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    pub(crate) fn add(&self, fd: OwnedFd, features: u64) -> SpaceId {
        let mut slots = self.slots.write();
        let first = self.next_slot.load(Ordering::Relaxed);
        let free = (first..MAX_CHILDREN)
            .chain(0..first)
            .find(|&index| slots[index].is_none());
        let Some(index) = free else {
            fail(format_args!(
                "the process has {MAX_CHILDREN} forked children whose pages are on devices, and \
                 forked another; the engine cannot serve more, and its data would read as zeros. \
                 Fork before migrating, or bring pages home first. The process ends now"
            ));
        };
        let space = space_of(index);
        if let Err(error) = epoll::add(
            &self.poll,
            &fd,
            EventData::new_u64(space.get().into()),
            EventFlags::IN,
        ) {
            fail(format_args!(
                "cannot watch a forked child ({error}); its faults would never be answered, \
                 so the process ends now"
            ));
        }
        self.next_slot
            .store((index + 1) % MAX_CHILDREN, Ordering::Relaxed);
        slots[index] = Some(Child {
            uffd: Uffd::of_child(fd, features),
            exit_reported: false,
        });
        self.count.fetch_add(1, Ordering::SeqCst);
        space
    }

    /// Closes a child's context; its missing pages read as zeros from now on.
    pub(crate) fn release(&self, space: SpaceId) {
        let child = index_of(space).and_then(|index| self.slots.write()[index].take());
        if child.is_some() {
            self.count.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Uses the context of a child; `None` when there is no such child.
    pub(crate) fn with<R>(&self, space: SpaceId, use_it: impl FnOnce(&Uffd) -> R) -> Option<R> {
        let slots = self.slots.read();
        let child = slots[index_of(space)?].as_ref()?;
        Some(use_it(&child.uffd))
    }

    /// What `look` finds first in the children that have messages, of which it
    /// looks at PROBES at most; the others' turn comes at the next call.
    /// What is no child's is told by its key.
    pub(crate) fn find_ready<R>(
        &self,
        mut look: impl FnMut(Result<SpaceId, u64>) -> Option<R>,
    ) -> Option<R> {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); PROBES];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let (ready, _) = epoll::wait(&self.poll, &mut events, Some(&now)).ok()?;
        ready
            .iter()
            .find_map(|event| match u16::try_from(event.data.u64()) {
                Ok(number) if u64::from(number) == NOBODY => None,
                Ok(number) => look(Ok(SpaceId::new(number))),
                Err(_) => look(Err(event.data.u64())),
            })
    }

    /// Reads messages of one child; `None` when there are none, or no child.
    pub(crate) fn read<'a>(
        &self,
        space: SpaceId,
        buffer: &'a mut [MaybeUninit<uffd_msg>],
    ) -> Option<&'a [uffd_msg]> {
        self.with(space, |uffd| uffd.read(buffer).ok()).flatten()
    }

    /// Whether one of the next few children is gone and that was not reported.
    pub(crate) fn any_gone(&self) -> bool {
        self.find_gone(PROBES).is_some()
    }

    /// The next child that is gone, once; looks at a few.
    pub(crate) fn take_gone(&self) -> Option<SpaceId> {
        let index = self.find_gone(PROBES)?;
        let mut slots = self.slots.write();
        let child = slots[index].as_mut()?;
        (!std::mem::replace(&mut child.exit_reported, true)).then(|| space_of(index))
    }

    fn find_gone(&self, probes: usize) -> Option<usize> {
        if self.count() == 0 {
            return None;
        }
        let slots = self.slots.read();
        let first = self.next_probe.load(Ordering::Relaxed);
        let open = (0..MAX_CHILDREN)
            .map(|step| (first + step) % MAX_CHILDREN)
            .filter(|&index| {
                slots[index]
                    .as_ref()
                    .is_some_and(|child| !child.exit_reported)
            });
        for index in open.take(probes) {
            if slots[index]
                .as_ref()
                .is_some_and(|child| child.uffd.is_gone())
            {
                // Stay here, so that whoever asks next finds it.
                self.next_probe.store(index, Ordering::Relaxed);
                return Some(index);
            }
            self.next_probe.store(index + 1, Ordering::Relaxed);
        }
        None
    }
}

fn space_of(index: usize) -> SpaceId {
    #[allow(
        clippy::cast_possible_truncation,
        reason = "an index is below MAX_CHILDREN"
    )]
    let number = index as u16 + 1;
    SpaceId::new(number)
}

fn index_of(space: SpaceId) -> Option<usize> {
    let index = usize::from(space.get()).checked_sub(1)?;
    (index < MAX_CHILDREN).then_some(index)
}

impl AsFd for Children {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.poll.as_fd()
    }
}
