//! Changes that are reported late, and faults that are served late.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hmm_hal::SpaceId;
use hmm_sim::{
    ARENA_START, CoreEngine, EngineUnderTest, HookPoint, MapRequest, Rates, Request, SimClock,
    SimConfig, SimDevice, SimSpace, Ticket, Touch,
};
use hmm_types::{Access, DeviceId, MemoryKind, PageCount, PageRange, VirtAddr};

const PAGES: u64 = 4;
/// Reads for which a thread does not get to run.
const LATE: u64 = 8;

fn config() -> SimConfig {
    let mut config = SimConfig::from_seed(1, 1);
    config.capabilities.move_pages = true;
    config.capabilities.fork_events = true;
    config.rates = Rates::default();
    config.devices = 1;
    config.frames = 64;
    config
}

fn pages(first: u64) -> PageRange {
    PageRange::from_pages(ARENA_START.plus_pages(first), PageCount::new(PAGES))
}

struct Process {
    space: SimSpace,
    engine: Arc<CoreEngine>,
}

impl Process {
    fn new() -> Self {
        let config = config();
        let space = SimSpace::new(&config);
        let device = SimDevice::new(&config, 0, &space);
        let engine = CoreEngine::new(&config, space.clone(), vec![device], SimClock::default());
        Self {
            space,
            engine: Arc::new(engine),
        }
    }

    /// Memory on the device, each page full of this value.
    fn on_device(&self, range: PageRange, value: u8) {
        self.space.mmap(MapRequest {
            range,
            kind: MemoryKind::PrivateAnonymous,
            foreign: false,
        });
        for page in range.iter_pages() {
            let fill = &mut |data: &mut hmm_sim::Payload| data.fill(value);
            let own = SpaceId::OWN;
            assert_eq!(
                self.space.touch(own, 1, page, Access::Write, fill),
                Touch::Done
            );
        }
        self.engine
            .request(Request::Migrate(range, DeviceId::new(0)));
    }

    /// What a CPU thread finds there.
    fn value(&self, page: VirtAddr) -> u8 {
        let mut value = 0;
        for _ in 0..100 {
            let look = &mut |data: &mut hmm_sim::Payload| value = data[0];
            if self.space.touch(SpaceId::OWN, 9, page, Access::Read, look) == Touch::Done {
                return value;
            }
            self.engine.read();
            self.engine.work();
        }
        panic!("nobody brings {page} home");
    }
}

/// One thread remaps its memory and does not get to say so. The place is free:
/// another one remaps there, and that is known to the engine first. Then it
/// changes that memory again, which must not be taken for the first thread's.
fn changes_hands(change: fn(&SimSpace, PageRange) -> Option<Ticket>) {
    let process = Process::new();
    let [place, spare, second] = [pages(0), pages(100), pages(200)];
    process.on_device(place, 1);
    process.on_device(second, 2);
    process.space.mremap(place, spare).unwrap();
    process.space.delay(LATE);
    let arrived = process.space.mremap(second, place).unwrap().unwrap();
    let changed = AtomicBool::new(false);
    let space = process.space.clone();
    process.space.set_hook(Some(Arc::new(move |point| {
        // As soon as the second thread has returned from mremap.
        let returned = point == HookPoint::Read && !space.is_unread(arrived);
        if returned && !changed.swap(true, Ordering::Relaxed) {
            let half = place.slice(0, PAGES / 2);
            assert!(change(&space, half).is_some(), "it is registered");
        }
    })));
    while process.space.has_unread() {
        process.engine.read();
    }
    process.space.set_hook(None);
    for page in spare.iter_pages() {
        assert_eq!(
            process.value(page),
            1,
            "the first thread's memory at {page}"
        );
    }
    for page in place.slice(PAGES / 2, PAGES / 2).iter_pages() {
        assert_eq!(
            process.value(page),
            2,
            "the second thread's memory at {page}"
        );
    }
}

#[test]
fn memory_that_changed_hands_is_unmapped() {
    changes_hands(|space, range| space.munmap(SpaceId::OWN, range));
}

#[test]
fn memory_that_changed_hands_is_mapped_over() {
    changes_hands(SimSpace::map_over);
}

#[test]
fn memory_that_changed_hands_moves_on() {
    changes_hands(|space, range| {
        let to = PageRange::from_pages(pages(300).start(), range.pages());
        space.mremap(range, to).unwrap()
    });
}

#[test]
fn memory_that_changed_hands_is_dropped() {
    changes_hands(|space, range| space.dontneed(SpaceId::OWN, range)?.1);
}

/// Everything comes home before a fork that is not reported; meanwhile memory
/// is remapped to where that has been looked for already.
#[test]
fn what_is_remapped_behind_the_sweep_comes_home_too() {
    let process = Process::new();
    let [behind, first, last] = [pages(0), pages(100), pages(200)];
    process.on_device(first, 1);
    process.on_device(last, 2);
    let moved = AtomicBool::new(false);
    let (space, engine) = (process.space.clone(), Arc::downgrade(&process.engine));
    process.space.set_hook(Some(Arc::new(move |point| {
        // While the first pages are copied.
        if point == HookPoint::Submit && !moved.swap(true, Ordering::Relaxed) {
            assert!(space.mremap(last, behind).unwrap().is_some());
        }
        if point.needs_reader()
            && let Some(engine) = engine.upgrade()
        {
            engine.read();
        }
    })));
    process.engine.before_fork();
    process.space.set_hook(None);
    for page in first.iter_pages().chain(behind.iter_pages()) {
        let there = process.space.peek(SpaceId::OWN, page).is_some();
        assert!(there, "{page} is still away");
    }
}

/// A handler has read a fault and does not get to run. Meanwhile the page comes
/// home by another way and is sent off again, at the program's wish: nobody
/// waits for it any more, and it must stay where it was sent.
#[test]
fn a_fault_that_is_served_late_brings_nothing_back() {
    let process = Process::new();
    let [range, other] = [pages(0), pages(100)];
    process.on_device(range, 1);
    let device = DeviceId::new(0);
    let read = |page| {
        let look = &mut |_: &mut hmm_sim::Payload| {};
        process
            .space
            .touch(SpaceId::OWN, 9, page, Access::Read, look)
    };
    assert_ne!(read(range.start()), Touch::Done, "the page is away");
    process.engine.read();
    process.engine.request(Request::Evict(range));
    assert_eq!(read(range.start()), Touch::Done, "the page is here");
    process.engine.request(Request::Migrate(range, device));
    assert!(process.engine.work(), "the fault is served now");
    for page in range.iter_pages() {
        let here = process.space.peek(SpaceId::OWN, page).is_some();
        assert!(!here, "{page} has come back");
    }
    // Who waits gets its page, also when other pages left after its fault.
    assert_ne!(read(range.start()), Touch::Done);
    process.engine.read();
    process.on_device(other, 2);
    assert_eq!(process.value(range.start()), 1);
}
