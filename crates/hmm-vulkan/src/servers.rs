//! Misses that two threads have served: a kernel that begins where nothing is on the
//! device misses all of it at once, and one processor moves memory slower than a machine
//! can. The launch's own thread takes part all the while, so a second one that comes
//! late, or not at all, holds up nothing but what it has begun.
//!
//! Used between dispatches only, when an unmapping finds nothing to wait for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hmm_sync::{Condvar, Mutex, Rank};
use hmm_types::{BLOCK_SIZE, PAGE_SIZE, PAGES_PER_BLOCK, PageRange, USER_END, VirtAddr};

use crate::LaunchError;
use crate::device::VulkanDevice;
use crate::launch::{Tally, bring};
use crate::log::Miss;

/// Fewer misses are not worth a wake-up.
const WORTH: usize = 64;
/// What one thread takes: misses up to the end of an aligned stretch of so many bytes, so
/// that the two bring no page together.
const STRETCH: u64 = 16 << 20;
/// Where there is a miss for so many pages, or for fewer, all of them are wanted.
const DENSE: u64 = 16;
/// Misses that are taken out at a time.
const HANDFUL: usize = 64;
/// How long the second thread sleeps without being called.
const NAP: Duration = Duration::from_secs(60);
/// How long to sleep before looking again; notifications come sooner.
const RECHECK: Duration = Duration::from_millis(100);

struct Work {
    misses: hmm_mem::Vec<Miss>,
    /// The first that nobody has taken.
    next: usize,
    /// None is served any more when so many pages have come.
    full: u64,
    /// The second thread is serving some.
    helps: bool,
    /// What it has counted, and the first error of either.
    tally: Tally,
    error: Option<LaunchError>,
}

/// The misses of a launch, as those see them who have them served.
pub(crate) struct Servers {
    work: Mutex<Work>,
    /// There are misses, or nobody serves any more.
    changed: Condvar,
    closed: AtomicBool,
    /// The second thread is there.
    runs: AtomicBool,
}

/// Misses that are one thread's.
struct Share {
    next: usize,
    end: usize,
    /// The first, the last, and how many there were.
    extent: Option<(VirtAddr, VirtAddr, usize)>,
}

impl Share {
    const NONE: Self = Self {
        next: 0,
        end: 0,
        extent: None,
    };

    /// Whole blocks, where all of its pages are wanted, and those are `most` or fewer. The
    /// misses are where kernels are now: they go on behind. Asked once.
    fn dense(&mut self, most: u64) -> Option<PageRange> {
        let (first, last, misses) = self.extent.take()?;
        if last.get() >= USER_END - BLOCK_SIZE {
            return None; // nothing is there
        }
        let misses = misses as u64;
        let dense = misses > 1 && last.pages_since(first.page_floor()) < misses * DENSE;
        let from = first.block_floor().max(VirtAddr::new(PAGE_SIZE));
        let upto = last.block_floor().plus_pages(PAGES_PER_BLOCK as u64);
        let blocks = PageRange::span(from, upto);
        (dense && blocks.pages().get() <= most).then_some(blocks)
    }
}

impl Servers {
    pub(crate) const fn new() -> Self {
        Self {
            work: Mutex::new(
                Rank::Device,
                Work {
                    misses: hmm_mem::vec(),
                    next: 0,
                    full: 0,
                    helps: false,
                    tally: Tally::new(),
                    error: None,
                },
            ),
            changed: Condvar::new(),
            closed: AtomicBool::new(false),
            runs: AtomicBool::new(false),
        }
    }

    /// Has misses served, until so many pages have come to the device; gives the list back.
    pub(crate) fn serve(
        &self,
        device: &'static VulkanDevice,
        mut misses: hmm_mem::Vec<Miss>,
        full: u64,
        tally: &mut Tally,
    ) -> (hmm_mem::Vec<Miss>, Result<(), LaunchError>) {
        if misses.len() < WORTH || !self.runs.load(Ordering::Relaxed) {
            let mut served = Ok(());
            for miss in &misses {
                served = bring(device, *miss, tally).map(|_| ());
                if served.is_err() || is_full(device, full) {
                    break;
                }
            }
            return (misses, served);
        }
        misses.sort_unstable_by_key(|miss| miss.address);
        {
            let mut work = self.work.lock();
            work.misses = misses;
            work.next = 0;
            work.full = full;
        }
        self.changed.notify_all();
        self.take_part(device, tally);
        let mut work = self.work.lock();
        while work.helps {
            work = self.changed.wait_timeout(work, RECHECK);
        }
        tally.add(std::mem::replace(&mut work.tally, Tally::new()));
        let error = work.error.take();
        let misses = std::mem::replace(&mut work.misses, hmm_mem::vec());
        work.next = 0;
        (misses, error.map_or(Ok(()), Err))
    }

    /// Serves misses until all are taken, or one cannot be served.
    fn take_part(&self, device: &'static VulkanDevice, tally: &mut Tally) {
        let full = self.work.lock().full;
        let mut share = Share::NONE;
        let mut hand = [Miss::NONE; HANDFUL];
        loop {
            let taken = self.take(&mut share, &mut hand);
            if taken == 0 {
                return;
            }
            // Not so much that two threads would drive out each other's.
            if let Some(range) = share.dense(u64::from(device.frames()) / 4)
                && let Some(&(id, engine)) = device.engine()
            {
                engine.prefetch(id, range);
            }
            for miss in &hand[..taken] {
                let brought = bring(device, *miss, tally);
                if brought.is_err() || is_full(device, full) {
                    let mut work = self.work.lock();
                    work.next = work.misses.len();
                    if let Err(error) = brought {
                        work.error.get_or_insert(error);
                    }
                    return;
                }
            }
        }
    }

    /// The next misses of a share, or of a new one.
    fn take(&self, share: &mut Share, hand: &mut [Miss; HANDFUL]) -> usize {
        let mut work = self.work.lock();
        if share.next == share.end {
            let rest = &work.misses[work.next..];
            let Some(first) = rest.first() else {
                return 0;
            };
            let end = stretch_end(first.address);
            let count = rest.partition_point(|miss| miss.address < end);
            share.extent = Some((first.address, rest[count - 1].address, count));
            share.next = work.next;
            share.end = work.next + count;
            work.next = share.end;
        }
        let taken = HANDFUL.min(share.end - share.next);
        hand[..taken].copy_from_slice(&work.misses[share.next..share.next + taken]);
        share.next += taken;
        taken
    }

    /// Body of the second thread.
    pub(crate) fn help(&self, device: &'static VulkanDevice) {
        self.runs.store(true, Ordering::SeqCst);
        let mut work = self.work.lock();
        while !self.closed.load(Ordering::SeqCst) {
            if work.next == work.misses.len() {
                work = self.changed.wait_timeout(work, NAP);
                continue;
            }
            work.helps = true;
            drop(work);
            let mut tally = Tally::new();
            self.take_part(device, &mut tally);
            work = self.work.lock();
            work.tally.add(tally);
            work.helps = false;
            self.changed.notify_all();
        }
        drop(work);
        self.runs.store(false, Ordering::SeqCst);
    }

    /// Ends the second thread. Without the lock: a thread of the program calls this, which
    /// may stop at any instruction until a page has come home.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        while self.runs.load(Ordering::SeqCst) {
            self.changed.notify_all();
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Whether more pages would only take the place of those that have just come.
fn is_full(device: &VulkanDevice, full: u64) -> bool {
    device.counters().pages_come() > full
}

/// Where the stretch that an address is in ends.
fn stretch_end(address: VirtAddr) -> VirtAddr {
    let end = address.get().saturating_add(1);
    let end = end.checked_next_multiple_of(STRETCH).unwrap_or(u64::MAX);
    VirtAddr::new(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn misses(addresses: impl IntoIterator<Item = u64>) -> hmm_mem::Vec<Miss> {
        let mut list = hmm_mem::vec();
        list.extend(addresses.into_iter().map(|address| Miss {
            address: VirtAddr::new(address),
            access: hmm_types::Access::Read,
        }));
        list
    }

    #[test]
    fn every_miss_is_taken_once_and_a_stretch_by_one() {
        let servers = Servers::new();
        let count = 3 * HANDFUL as u64 * 4;
        servers.work.lock().misses = misses((0..count).map(|at| at * (STRETCH / 300)));
        let mut shares = [Share::NONE; 2];
        let mut hand = [Miss::NONE; HANDFUL];
        let mut seen: Vec<(u64, usize)> = Vec::new();
        // In turns, a few times more than it takes.
        for turn in 0..40 {
            let who = turn % 2;
            let taken = servers.take(&mut shares[who], &mut hand);
            seen.extend(hand[..taken].iter().map(|miss| (miss.address.get(), who)));
        }
        seen.sort_unstable();
        let all: Vec<u64> = seen.iter().map(|&(address, _)| address).collect();
        assert_eq!(
            all,
            (0..count)
                .map(|at| at * (STRETCH / 300))
                .collect::<Vec<_>>()
        );
        for pair in seen.windows(2) {
            let together = pair[0].0 / STRETCH == pair[1].0 / STRETCH;
            assert!(!together || pair[0].1 == pair[1].1, "{pair:?}");
        }
    }

    #[test]
    fn what_is_wanted_as_a_whole_is_whole_blocks() {
        let dense = |addresses: &[u64], most| {
            let servers = Servers::new();
            servers.work.lock().misses = misses(addresses.iter().copied());
            let mut share = Share::NONE;
            assert!(servers.take(&mut share, &mut [Miss::NONE; HANDFUL]) > 0);
            let found = share.dense(most);
            assert_eq!(share.dense(most), None, "asked once");
            found.map(|range| (range.start().get(), range.end().get()))
        };
        let each: Vec<u64> = (0..100).map(|at| 0x4000_3000 + at * 0x4008).collect();
        assert_eq!(dense(&each, 512), Some((0x4000_0000, 0x4020_0000)));
        assert_eq!(dense(&each, 511), None, "too much");
        // All of them are taken at once.
        let few = &each[..HANDFUL];
        assert_eq!(dense(few, 512), Some((0x4000_0000, 0x4020_0000)));
        assert_eq!(dense(&[0x4000_3000], 512), None, "a single one");
        assert_eq!(dense(&[0x4000_3000, 0x4003_3000], 512), None, "far apart");
        assert_eq!(dense(&[0, 8], 512), Some((PAGE_SIZE, BLOCK_SIZE)));
        assert_eq!(dense(&[u64::MAX - 9, u64::MAX - 1], 512), None);
    }

    #[test]
    fn the_last_stretch_ends_with_the_addresses() {
        assert_eq!(stretch_end(VirtAddr::new(0)).get(), STRETCH);
        assert_eq!(stretch_end(VirtAddr::new(STRETCH)).get(), 2 * STRETCH);
        assert_eq!(stretch_end(VirtAddr::new(u64::MAX - 1)).get(), u64::MAX);
    }
}
