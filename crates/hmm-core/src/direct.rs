//! Ways home without a flight: nothing is copied while no lock is held, so nobody
//! ever sees these pages on their way.
//!
//! - A page that still lies in staging is moved back.
//! - A few pages whose frames the CPU can read are copied by the kernel straight
//!   from the device's memory. For one page that is a claim, a copy and a second
//!   look at all tables less.

use hmm_hal::{Progress, SpaceId, Stop};
use hmm_types::{FrameRange, PageCount, PageRange};

use crate::engine::Engine;
use crate::executor::Executor;
use crate::home::{Claim, Claimed, Step};
use crate::map::BlockInner;
use crate::page::PageState;
use crate::staging::StagingPage;

impl Engine<'_> {
    /// Puts the first pages of a claim in place without claiming them, if they are
    /// few and the CPU can read their frames. The device maps none of them any
    /// more. `None`, when that is not the way.
    pub(crate) fn bring_at_once(
        &self,
        executor: &Executor,
        inner: &mut BlockInner,
        claim: &Claim<'_>,
        place: PageRange,
    ) -> Option<Claimed<'static>> {
        let few = u64::from(claim.pages) <= self.settings.copy_at_most.get();
        if !few || claim.part_of_hugetlb.is_some() {
            return None;
        }
        let (_, frames) = claim.runs(0, claim.pages).next()?;
        let place = place.slice(0, u64::from(frames.count()));
        let wakes = executor.is_alone();
        let mut progress = Progress {
            done: PageCount::ZERO,
            stop: None,
        };
        let slot = self.devices.slot(claim.device);
        slot.device.with_host_view(frames, &mut |host| {
            progress = if wakes {
                self.space.copy_pages_and_wake(SpaceId::OWN, host, place)
            } else {
                self.space.copy_pages(SpaceId::OWN, host, place)
            };
        });
        let placed = u32::try_from(progress.done.get()).unwrap_or(0);
        if placed == 0 {
            // Whatever else stops it is told by the longer way.
            return (progress.stop == Some(Stop::Again)).then_some(Claimed::Again);
        }
        slot.free(FrameRange::new(frames.first(), placed));
        inner.protected = false;
        for index in claim.first..claim.first + placed {
            inner.set(index, PageState::System);
        }
        inner.tidy();
        Some(Claimed::Came {
            pages: placed.into(),
            to_wake: (!wakes).then(|| place.slice(0, placed.into())),
        })
    }

    /// Puts one staged page back in place.
    pub(crate) fn unstage(
        &self,
        inner: &mut BlockInner,
        index: u32,
        place: PageRange,
        page: StagingPage,
        step: &mut Step,
    ) -> Claimed<'static> {
        let from = PageRange::from_pages(self.staging.lock().address(page), PageCount::ONE);
        self.invalidate(inner, place);
        let mut progress = self.space.move_pages(from, place.start());
        let moved = progress.stop.is_none();
        if matches!(progress.stop, Some(Stop::Incompatible | Stop::Busy)) {
            progress = self.space.copy_pages(SpaceId::OWN, from.start(), place);
        }
        match progress.stop {
            None => {
                inner.set(index, PageState::System);
                if moved {
                    self.staging.lock().put(page, false);
                } else {
                    self.staging.lock().put_used(page, self.reuses_pages());
                }
                Claimed::Came {
                    pages: 1,
                    to_wake: Some(place),
                }
            }
            Some(Stop::Gone) => {
                step.passed += 1;
                Claimed::Nothing
            }
            Some(Stop::Exists) if self.is_guarded(place) => {
                inner.set(index, PageState::System);
                self.staging.lock().put_used(page, self.reuses_pages());
                self.space.wake(SpaceId::OWN, place);
                step.passed += 1;
                Claimed::Nothing
            }
            Some(Stop::Again | Stop::NoMemory | Stop::NotMapped) => Claimed::Again,
            Some(stop) => unreachable!("a staged page cannot go back to {place}: {stop:?}"),
        }
    }
}
