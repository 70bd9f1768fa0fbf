//! Making room on a device, and bringing everything home.

use std::sync::atomic::Ordering::Relaxed;

use hmm_types::{DeviceId, PAGES_PER_BLOCK, PageCount, PageRange, StayReason, VirtAddr};

use crate::engine::Engine;
use crate::executor::Executor;
use crate::home::Home;
use crate::page::PageState;

/// How long sweeps go on without any gain: whoever has a page in flight may
/// wait for a processor.
const SWEEP_PATIENCE_NS: u64 = 30_000_000_000;
/// The same in sweeps, where nobody sleeps.
const SWEEPS: u32 = 1024;
/// Looks for something to evict, and waits for what others evict, until a device
/// is said to be full.
const ROOM_TRIES: u32 = 1024;
/// Waits for a page of several blocks that count as one.
const LEAVING_WAITS: u32 = 64;
/// Pages that cannot come home, until a device is said to be full.
const PASSED_OVER: u32 = 8;

/// What could be evicted.
enum Victim {
    Found(PageRange),
    /// Nothing, but pages are on their way home from the device, perhaps one of
    /// several blocks.
    Leaving {
        gigantic: bool,
    },
    None,
}

impl Engine<'_> {
    /// Makes room on a device: evicts the block that it has not used for longest,
    /// unless that overlaps `keep`, or waits for pages that are on their way home
    /// from it anyway (those need no room, so they do come). False when there is
    /// nothing to evict. An eviction never waits for pages that leave.
    pub(crate) fn make_room(
        &self,
        executor: &mut Executor,
        device: DeviceId,
        keep: PageRange,
    ) -> bool {
        let mut passed_over = 0;
        let mut tries = ROOM_TRIES;
        let mut waits = 0;
        while tries > 0 {
            tries -= 1;
            let victim = match self.least_recently_used(device, keep) {
                Victim::Found(range) => range,
                Victim::Leaving { gigantic } => {
                    waits += 1;
                    if gigantic && self.space.may_sleep() && waits % LEAVING_WAITS != 0 {
                        tries += 1;
                    }
                    self.wait_for_transition();
                    continue;
                }
                Victim::None => break,
            };
            let mut from = victim.start();
            let mut moved = 0;
            let (mut busy, mut stuck) = (false, false);
            while from < victim.end() {
                let rest = PageRange::span(from, victim.end());
                let step = self.step_home(executor, rest, Home::ahead().only(Some(device)));
                moved += step.moved;
                busy |= step.busy > 0;
                stuck |= step.stuck.is_some();
                from = from.plus_pages(step.passed.max(1));
            }
            self.stats.evicted_pages.fetch_add(moved, Relaxed);
            if moved > 0 {
                return true;
            }
            // Where others were quicker there may be more to evict; they may have used
            // the room already. A page of several blocks that the kernel has no page
            // for is the last one from now on.
            if stuck && !busy {
                passed_over += 1;
                let gigantic = victim.pages() > PageCount::from(PAGES_PER_BLOCK);
                if !gigantic || passed_over == PASSED_OVER {
                    break;
                }
            }
        }
        false
    }

    fn least_recently_used(&self, device: DeviceId, keep: PageRange) -> Victim {
        let map = self.gate.read();
        let mut best: Option<(u64, PageRange)> = None;
        let (mut leaving, mut gigantic) = (false, false);
        for piece in map.pieces() {
            let inner = map.block(piece.block).lock();
            if inner.in_flight() > 0 {
                let leaves = (piece.first..piece.first + piece.pages).any(|index| {
                    matches!(inner.state(index), PageState::Downloading { device: from, .. } if from == device)
                });
                leaving |= leaves;
                gigantic |= leaves && map.block(piece.block).is_gigantic();
            }
            if inner.away() == 0 || best.is_some_and(|(used, _)| used <= inner.last_use) {
                continue;
            }
            // It would go as a whole, with what is to be kept of it.
            if map.block(piece.block).is_gigantic() && piece.range().overlaps(keep) {
                continue;
            }
            let on_device = |address: VirtAddr| {
                let index = u64::from(piece.first) + address.pages_since(piece.start);
                u32::try_from(index).is_ok_and(|index| {
                    matches!(inner.state(index), PageState::Device { device: on, .. } if on == device)
                })
            };
            let victim = outside(piece.range(), keep)
                .into_iter()
                .flatten()
                .find(|part| part.iter_pages().any(on_device));
            if let Some(part) = victim {
                best = Some((inner.last_use, part));
            }
        }
        match best {
            Some((_, range)) => Victim::Found(range),
            None if leaving => Victim::Leaving { gigantic },
            None => Victim::None,
        }
    }

    /// Brings home everything, or everything that is on one device, while
    /// nothing leaves. True when, at one moment, nothing was left.
    pub fn bring_all_home(&self, executor: &mut Executor, only: Option<DeviceId>) -> bool {
        self.bring_all(executor, only, Home::ahead().only(only))
    }

    /// Prepares a fork that the kernel will not report: nothing may be away,
    /// while nothing leaves. What cannot be read from its device any more is
    /// lost, to the child as to the parent: it is poisoned. True when nothing
    /// was left.
    pub fn bring_all_home_before_fork(&self, executor: &mut Executor) -> bool {
        for (device, _) in self.devices.all() {
            self.leave_coherent_device(device);
        }
        self.bring_all(executor, None, Home::whatever_it_takes())
    }

    fn bring_all(&self, executor: &mut Executor, only: Option<DeviceId>, home: Home) -> bool {
        let mut sweeps = 0;
        let mut since = self.clock.now_ns();
        loop {
            let (moved, stuck) = self.sweep_home(executor, home);
            // Not what the sweep has met: memory that is remapped can get
            // behind it, and who gave a page up leaves it where it was.
            if !self.has_pages_away(only) {
                return true;
            }
            let now = self.clock.now_ns();
            if moved > 0 {
                (sweeps, since) = (0, now);
            } else if stuck && !home.leaves_nothing() {
                return false;
            }
            let patient = if self.space.may_sleep() {
                now.saturating_sub(since) < SWEEP_PATIENCE_NS
            } else {
                sweeps < SWEEPS
            };
            if !patient {
                return false;
            }
            sweeps += 1;
            self.wait_for_transition();
        }
    }

    /// Brings home what is away and not in flight. Returns how many pages came,
    /// and whether a device could not give some.
    fn sweep_home(&self, executor: &mut Executor, home: Home) -> (u64, bool) {
        let mut cursor = VirtAddr::new(0);
        let mut moved = 0;
        let mut stuck = false;
        while let Some(range) = self.next_away(cursor) {
            let step = self.step_home(executor, range, home);
            moved += step.moved;
            stuck |= step
                .stuck
                .is_some_and(|(_, reason)| reason != StayReason::Busy);
            cursor = range.start().plus_pages(step.passed.max(1));
        }
        (moved, stuck)
    }

    /// The first mapped range at or behind `cursor` whose block has pages away
    /// or in flight.
    fn next_away(&self, cursor: VirtAddr) -> Option<PageRange> {
        let map = self.gate.read();
        let start = cursor.max(VirtAddr::new(hmm_types::PAGE_SIZE));
        let everything = PageRange::span(start, VirtAddr::new(hmm_types::USER_END));
        map.overlapping(everything)
            .find(|piece| {
                let inner = map.block(piece.block).lock();
                inner.away() > 0 || inner.in_flight() > 0
            })
            .map(|piece| piece.range())
    }
}

/// The parts of a range before and behind what is to be kept.
fn outside(range: PageRange, keep: PageRange) -> [Option<PageRange>; 2] {
    let Some(common) = range.intersection(keep) else {
        return [Some(range), None];
    };
    let part = |from: VirtAddr, upto: VirtAddr| (from < upto).then(|| PageRange::span(from, upto));
    [
        part(range.start(), common.start()),
        part(common.end(), range.end()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_cut_out() {
        let range = |page: u64, pages: u64| {
            PageRange::from_pages(VirtAddr::new(page * 4096), PageCount::new(pages))
        };
        let all = range(10, 10);
        assert_eq!(outside(all, range(30, 5)), [Some(all), None]);
        assert_eq!(
            outside(all, range(12, 3)),
            [Some(range(10, 2)), Some(range(15, 5))]
        );
        assert_eq!(outside(all, range(5, 7)), [None, Some(range(12, 8))]);
        assert_eq!(outside(all, range(1, 100)), [None, None]);
    }
}
