//! How much to bring along with a page that faults.
//!
//! A fault somewhere brings its *granule*: the aligned pages around it. Faults
//! that follow each other form a *stream*: its window doubles with each of them
//! up to a few blocks, and the engine works one window ahead, so that a sequential
//! reader finds its pages there. (The same idea as the kernel's file
//! read-ahead, `mm/readahead.c`.)

use hmm_sync::{Mutex, Rank};
use hmm_types::{PAGE_SIZE, PAGES_PER_BLOCK, VirtAddr};

/// Pages of a window at most, for a CPU: 8 MiB. With less, one handler waits
/// for the reader while another works.
pub(crate) const CPU_WINDOW: u64 = 4 * PAGES_PER_BLOCK as u64;
/// The same for a device, whose kernel waits for all of it.
pub(crate) const DEVICE_WINDOW: u64 = PAGES_PER_BLOCK as u64;
/// Pages of a window that come with the fault, while the thread waits.
const FIRST: u64 = 128;
/// Sequential readers that are followed at a time.
const STREAMS: usize = 8;

#[derive(Clone, Copy)]
struct Stream {
    /// Number of the first page that nobody has asked for yet.
    next: u64,
    window: u64,
    used: u64,
}

/// What to bring home: page numbers, end not included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// With the fault.
    pub(crate) now: (u64, u64),
    /// After it, while the thread already runs on; empty without a stream.
    pub(crate) ahead: (u64, u64),
}

impl Plan {
    pub(crate) fn addresses((from, upto): (u64, u64)) -> (VirtAddr, VirtAddr) {
        (
            VirtAddr::new(from * PAGE_SIZE),
            VirtAddr::new(upto * PAGE_SIZE),
        )
    }
}

/// The streams of one direction.
pub(crate) struct Readahead {
    granule: u64,
    most: u64,
    enabled: bool,
    streams: Mutex<([Stream; STREAMS], u64)>,
}

impl Readahead {
    /// `granule_pages` is a power of two, at most a block; windows grow to
    /// `most_pages`.
    pub(crate) const fn new(granule_pages: u64, most_pages: u64, enabled: bool) -> Self {
        assert!(granule_pages.is_power_of_two() && granule_pages <= PAGES_PER_BLOCK as u64);
        Self {
            granule: granule_pages,
            most: most_pages,
            enabled,
            streams: Mutex::new(
                Rank::Queue,
                (
                    [Stream {
                        next: 0,
                        window: 0,
                        used: 0,
                    }; STREAMS],
                    0,
                ),
            ),
        }
    }

    /// Plans for a fault at `address`, whose page rests somewhere else.
    ///
    /// So it is not under way, whatever was planned: whoever is to bring it has
    /// not come so far, or it has come and has left again.
    pub(crate) fn plan(&self, address: VirtAddr) -> Plan {
        self.plan_for(address, false)
    }

    /// Plans for a fault at `address`, whose page is on its way.
    pub(crate) fn plan_on(&self, address: VirtAddr) -> Plan {
        self.plan_for(address, true)
    }

    /// Plans for whoever waits until all of the window has come: its page numbers, end
    /// not included.
    ///
    /// A page of a window that has come is missed again when it had to make room. That
    /// is no reader who goes on, and a larger window would take away even more of what
    /// is used together with the page: it comes with its granule only.
    pub(crate) fn plan_whole(&self, address: VirtAddr) -> (u64, u64) {
        let page = address.page_number();
        let came = |stream: &Stream| {
            stream.window > 0 && page < stream.next && page + 2 * stream.window >= stream.next
        };
        if self.enabled && self.streams.lock().0.iter().any(came) {
            let start = page / self.granule * self.granule;
            return (start, start + self.granule);
        }
        let plan = self.plan(address);
        (plan.now.0, plan.now.1.max(plan.ahead.1))
    }

    fn plan_for(&self, address: VirtAddr, under_way: bool) -> Plan {
        let page = address.page_number();
        let start = page / self.granule * self.granule;
        let now = (start, start + self.granule);
        if !self.enabled {
            return Plan {
                now,
                ahead: (now.1, now.1),
            };
        }
        let (streams, clock) = &mut *self.streams.lock();
        *clock += 1;
        let follows = |stream: &&mut Stream| {
            // At the frontier, or inside the window that is still on its way.
            stream.window > 0
                && page <= stream.next + self.granule
                && page + 2 * stream.window >= stream.next
        };
        if let Some(stream) = streams.iter_mut().find(follows) {
            stream.window = (stream.window * 2).min(self.most);
            stream.used = *clock;
            let (now, from) = if under_way {
                ((page, page), stream.next.max(page))
            } else {
                let end = (page + stream.window.min(FIRST)) / self.granule * self.granule;
                let end = end.max(start + self.granule);
                ((start, end), end)
            };
            // Never further ahead than one window of the reader.
            let upto = (page + 2 * stream.window).max(from);
            stream.next = upto;
            return Plan {
                now,
                ahead: (from, upto),
            };
        }
        let oldest = streams.iter_mut().min_by_key(|stream| stream.used);
        if let Some(stream) = oldest {
            *stream = Stream {
                next: now.1,
                window: self.granule,
                used: *clock,
            };
        }
        Plan {
            now,
            ahead: (now.1, now.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(page: u64) -> VirtAddr {
        VirtAddr::new(page * PAGE_SIZE)
    }

    #[test]
    fn what_made_room_and_is_missed_again_takes_less_along() {
        let readahead = Readahead::new(64, DEVICE_WINDOW, true);
        let mut next = readahead.plan_whole(at(0)).1;
        assert_eq!(next, 64);
        for _ in 0..8 {
            let (from, upto) = readahead.plan_whole(at(next));
            assert!(from <= next && upto > next + 64, "{from} to {upto}");
            next = upto;
        }
        // Three pages take turns, far from each other.
        for page in [next - 1, 1 << 20, 1 << 30].repeat(10) {
            let (from, upto) = readahead.plan_whole(at(page));
            assert_eq!((from, upto), (page / 64 * 64, page / 64 * 64 + 64));
        }
        // The reader goes on where it was.
        assert!(readahead.plan_whole(at(next)).1 > next + 64);
    }

    #[test]
    fn a_lone_fault_brings_its_granule() {
        let readahead = Readahead::new(16, DEVICE_WINDOW, true);
        let plan = readahead.plan(at(1000));
        assert_eq!(plan.now, (992, 1008));
        assert_eq!(plan.ahead.0, plan.ahead.1);
    }

    #[test]
    fn a_sequential_reader_is_led_by_growing_windows() {
        let readahead = Readahead::new(16, DEVICE_WINDOW, true);
        let mut present = readahead.plan(at(0)).now.1;
        let mut faults = 1;
        while present < 100_000 {
            let plan = readahead.plan(at(present));
            assert_eq!(plan.now.0, present, "nothing is skipped");
            assert!(plan.ahead.0 <= plan.now.1.max(present));
            present = plan.now.1.max(plan.ahead.1);
            faults += 1;
        }
        assert!(faults < 130, "{faults} faults for 100,000 pages");
    }

    #[test]
    fn pages_that_left_again_are_planned_again() {
        let readahead = Readahead::new(16, DEVICE_WINDOW, true);
        let mut page = 0;
        for _ in 0..20 {
            let plan = readahead.plan(at(page));
            page = plan.now.1.max(plan.ahead.1);
        }
        // Everything leaves; the reader starts over, just behind the frontier.
        let again = page - 1000;
        let plan = readahead.plan(at(again));
        assert!(plan.ahead.1 > again + 256, "{plan:?}");
        assert_eq!(plan.ahead.0, plan.now.1, "nothing is skipped");
        // What is on its way is not planned again.
        let plan = readahead.plan_on(at(again + 600));
        assert_eq!(plan.now.0, plan.now.1);
        assert!(plan.ahead.0 >= again + 1024, "{plan:?}");
    }

    #[test]
    fn random_faults_never_plan_far() {
        let readahead = Readahead::new(16, DEVICE_WINDOW, true);
        let mut page = 1u64;
        for _ in 0..1000 {
            page = page.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 8;
            let plan = readahead.plan(at(page % (1 << 30)));
            assert!(plan.ahead.1 - plan.now.0 <= 2048);
        }
    }
}
