//! Mirroring: how somebody outside of the engine keeps a copy of page
//! translations in step with the program's memory.
//!
//! The protocol is the kernel's (`Documentation/mm/hmm.rst`): take the sequence
//! of a notifier ([`Engine::read_begin`]), look pages up ([`Engine::snapshot`],
//! [`Engine::range_fault`]), take your own lock, and use what you found only if
//! nothing was invalidated since ([`Engine::read_retry`]).

use hmm_hal::{CpuPage, SpaceError};
use hmm_mem::Vec;
use hmm_types::{Access, BLOCK_PAGES, DeviceId, PageRange, PageResidency, StayReason};

use crate::engine::{BUSY_LIMIT, Engine};
use crate::executor::{BOUNCE_PAGES, Executor};
use crate::home::Home;
use crate::page::PageState;

/// Notifiers that one engine has at most.
const MAX_NOTIFIERS: usize = 1024;

/// A registered interest in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotifierId(u64);

/// How often a notifier's range had been invalidated at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence(u64);

/// Who is told about invalidations.
///
/// It is called with the gate and a block locked, before the range changes: it
/// must take the range out of use, allocate nothing and wait for nothing but
/// accesses that are under way.
pub trait Notifier: Send + Sync + std::fmt::Debug {
    /// Pages of the range are about to change or to go.
    fn invalidate(&self, range: PageRange);
}

#[derive(Debug)]
struct Watch {
    id: NotifierId,
    range: PageRange,
    sequence: u64,
    notifier: Option<&'static dyn Notifier>,
}

/// All notifiers of an engine.
pub(crate) struct Notifiers {
    watches: Vec<Watch>,
    next: u64,
}

impl Notifiers {
    pub(crate) const fn new() -> Self {
        Self {
            watches: hmm_mem::vec(),
            next: 0,
        }
    }

    pub(crate) fn invalidate(&mut self, range: PageRange) {
        for watch in &mut self.watches {
            if let Some(common) = watch.range.intersection(range) {
                watch.sequence += 1;
                if let Some(notifier) = watch.notifier {
                    notifier.invalidate(common);
                }
            }
        }
    }

    fn sequence(&self, id: NotifierId) -> Option<Sequence> {
        let watch = self.watches.iter().find(|watch| watch.id == id)?;
        Some(Sequence(watch.sequence))
    }
}

/// One page, as a mirror sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorEntry {
    /// Nothing is mapped, or it allows no access.
    Error,
    /// Mapped, but no page is there yet.
    None,
    /// A page of system memory.
    System {
        /// It can be written as it is: the mapping allows it, and it is not to
        /// be copied first.
        write: bool,
        /// Part of a huge page.
        huge: bool,
        /// Of one of a gigabyte.
        gigantic: bool,
        /// The zero page.
        zero: bool,
        /// In this device's coherent memory.
        coherent: Option<DeviceId>,
    },
    /// Away: on a device, exclusive, or in flight.
    Away {
        /// Where.
        residency: PageResidency,
        /// The mapping lets it be written.
        write: bool,
        /// Part of a huge page that the device has as a whole.
        huge: bool,
    },
}

impl Engine<'_> {
    /// Watches a range, until [`Engine::unwatch`]. `None` when there are too
    /// many notifiers.
    pub fn watch(
        &self,
        range: PageRange,
        notifier: Option<&'static dyn Notifier>,
    ) -> Option<NotifierId> {
        let mut notifiers = self.notifiers.lock();
        if notifiers.watches.len() == MAX_NOTIFIERS {
            return None;
        }
        let id = NotifierId(notifiers.next);
        notifiers.next += 1;
        notifiers.watches.push(Watch {
            id,
            range,
            sequence: 0,
            notifier,
        });
        Some(id)
    }

    /// Ends a watch.
    pub fn unwatch(&self, id: NotifierId) {
        self.notifiers.lock().watches.retain(|watch| watch.id != id);
    }

    /// The sequence to compare with later; `None` for an ended watch.
    #[must_use]
    pub fn read_begin(&self, id: NotifierId) -> Option<Sequence> {
        self.notifiers.lock().sequence(id)
    }

    /// Whether something of the range was invalidated since: then what was
    /// looked up must be looked up again.
    #[must_use]
    pub fn read_retry(&self, id: NotifierId, sequence: Sequence) -> bool {
        self.notifiers.lock().sequence(id) != Some(sequence)
    }

    /// What is where, one entry for each page; changes nothing and makes
    /// nothing present.
    ///
    /// # Errors
    /// When the kernel's tables cannot be read.
    pub fn snapshot(&self, range: PageRange) -> Result<Vec<MirrorEntry>, SpaceError> {
        let mut entries = hmm_mem::vec_with_capacity(range.pages().index());
        entries.resize(range.pages().index(), MirrorEntry::Error);
        let slots = |part: PageRange| {
            let from = part.start().pages_since(range.start());
            let upto = from + part.pages().get();
            hmm_types::PageCount::new(from).index()..hmm_types::PageCount::new(upto).index()
        };
        let mut writable = hmm_mem::vec();
        self.space.mappings(range, &mut |mapping| {
            if mapping.permissions.read {
                entries[slots(mapping.range)].fill(MirrorEntry::None);
            }
            writable.push((mapping.range, mapping.permissions.write));
        })?;
        let may_write = |at| {
            writable
                .iter()
                .any(|&(range, write): &(PageRange, bool)| write && range.contains(at))
        };
        self.space.cpu_pages(range, &mut |part, page| {
            let CpuPage {
                huge,
                gigantic,
                zero,
                own,
            } = page;
            for (entry, at) in entries[slots(part)].iter_mut().zip(part.iter_pages()) {
                if *entry == MirrorEntry::None {
                    let write = own && may_write(at);
                    *entry = MirrorEntry::System {
                        write,
                        huge,
                        gigantic,
                        zero,
                        coherent: None,
                    };
                }
            }
        })?;
        for ((entry, residency), at) in entries
            .iter_mut()
            .zip(self.residency(range))
            .zip(range.iter_pages())
        {
            if *entry == MirrorEntry::Error {
                continue;
            }
            if let PageResidency::Coherent(device) = residency {
                if let MirrorEntry::System { coherent, .. } = entry {
                    *coherent = Some(device);
                }
            } else if residency != PageResidency::System {
                *entry = MirrorEntry::Away {
                    residency,
                    write: may_write(at),
                    huge: false,
                };
            }
        }
        self.huge_blocks(range, |part| {
            for entry in &mut entries[slots(part)] {
                if let MirrorEntry::Away { huge, .. } = entry {
                    *huge = true;
                }
            }
        });
        Ok(entries)
    }

    /// Visits what of a range is part of huge pages that left as such and are
    /// on one device as a whole.
    fn huge_blocks(&self, range: PageRange, mut visit: impl FnMut(PageRange)) {
        let map = self.gate.read();
        for piece in map.overlapping(range) {
            let block = map.block(piece.block);
            let inner = block.lock();
            let whole = block
                .place_of(0, BLOCK_PAGES)
                .is_some_and(|place| place.pages().get() == u64::from(BLOCK_PAGES));
            if !((inner.huge || block.is_hugetlb()) && whole) {
                continue;
            }
            let PageState::Device { device, .. } = inner.state(0) else {
                continue;
            };
            let there = |index| match inner.state(index) {
                PageState::Device { device: on, .. } => on == device,
                _ => false,
            };
            if (0..BLOCK_PAGES).all(there) {
                visit(piece.range());
            }
        }
    }

    /// Makes the pages of a range present for an access, then looks as
    /// [`Engine::snapshot`] does. Pages on `owner` stay there; pages on other
    /// devices come home.
    ///
    /// # Errors
    /// Why a page cannot be had: [`StayReason::NotMapped`],
    /// [`StayReason::NoAccess`] (also for a write to read-only memory), or
    /// [`StayReason::Busy`] after too many changes.
    pub fn range_fault(
        &self,
        executor: &mut Executor,
        range: PageRange,
        access: Access,
        owner: Option<DeviceId>,
    ) -> Result<Vec<MirrorEntry>, (PageRange, StayReason)> {
        for _ in 0..BUSY_LIMIT {
            let entries = self
                .snapshot(range)
                .map_err(|_| (range, StayReason::Limit))?;
            let mut complete = true;
            for (entry, page) in entries.iter().zip(range.iter_pages()) {
                let page = PageRange::from_pages(page, hmm_types::PageCount::ONE);
                let owned = |residency| {
                    owner.is_some_and(|owner| {
                        residency == PageResidency::Device(owner)
                            || residency == PageResidency::Exclusive(owner)
                    })
                };
                let wants_write = access == Access::Write;
                match *entry {
                    MirrorEntry::Error => return Err((page, StayReason::NotMapped)),
                    MirrorEntry::Away { write: false, .. } if wants_write => {
                        return Err((page, StayReason::NoAccess));
                    }
                    MirrorEntry::System { write: false, .. } if wants_write => {
                        complete = false;
                        self.touch(executor, page, access)?;
                    }
                    MirrorEntry::System { .. } => {}
                    MirrorEntry::Away { residency, .. } if owned(residency) => {}
                    MirrorEntry::Away { residency, .. } => {
                        complete = false;
                        if residency == PageResidency::InFlight {
                            self.wait_for_transition();
                        } else {
                            self.step_home(executor, page, Home::ahead());
                        }
                    }
                    MirrorEntry::None => {
                        complete = false;
                        self.touch(executor, page, access)?;
                    }
                }
            }
            if complete {
                return Ok(entries);
            }
        }
        Err((range, StayReason::Busy))
    }

    /// Has the kernel make a page present.
    fn touch(
        &self,
        executor: &Executor,
        page: PageRange,
        access: Access,
    ) -> Result<(), (PageRange, StayReason)> {
        debug_assert!(BOUNCE_PAGES >= 1 && !executor.reads_events());
        let touched = match access {
            Access::Write => self.space.unshare(page).is_ok(),
            Access::Read => {
                let bounce = executor.bounce(1).start();
                self.space.read_pages(page, bounce).stop.is_none()
            }
        };
        if touched {
            Ok(())
        } else {
            let reason = match access {
                Access::Write => StayReason::NoAccess,
                Access::Read => StayReason::NotMapped,
            };
            Err((page, reason))
        }
    }
}
