//! Changes that are reported late or not at all, and faults that are served late.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use hmm_hal::SpaceId;
use hmm_sim::{
    ARENA_START, CoreEngine, EngineUnderTest, HookPoint, MapRequest, Rates, Request, SimClock,
    SimConfig, SimDevice, SimSpace, Ticket, Touch,
};
use hmm_types::{
    Access, DeviceId, MemoryKind, PAGES_PER_BLOCK, PageCount, PageRange, Permissions, VirtAddr,
};

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
        Self::with(config())
    }

    fn with(config: SimConfig) -> Self {
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
        self.map(range, value);
        self.engine
            .request(Request::Migrate(range, DeviceId::new(0)));
    }

    /// Memory, each page full of this value.
    fn map(&self, range: PageRange, value: u8) {
        self.space.mmap(MapRequest {
            range,
            kind: MemoryKind::PrivateAnonymous,
            page_len: PageCount::ONE,
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

/// Memory arrives, goes on without saying so at once, and other memory arrives at the
/// same place, which is known to the engine before.
#[test]
fn memory_that_has_just_arrived_changes_hands() {
    let process = Process::new();
    let [first, second] = [pages(100), pages(200)];
    let [place, spare] = [pages(0), pages(300)];
    process.on_device(first, 1);
    process.on_device(second, 2);
    process.space.mremap(first, place).unwrap();
    process.engine.read();
    process.space.mremap(place, spare).unwrap();
    process.space.delay(LATE);
    process.space.mremap(second, place).unwrap();
    while process.space.has_unread() {
        process.engine.read();
    }
    for (range, value) in [(spare, 1), (place, 2)] {
        for page in range.iter_pages() {
            assert_eq!(process.value(page), value, "what has arrived at {page}");
        }
    }
}

/// A mapping grows, which the kernel does not report. One thread changes what
/// has grown and does not get to say so; another one's memory arrives there.
fn grown_memory_changes_hands(change: fn(&SimSpace, PageRange) -> Option<Ticket>) {
    let process = Process::new();
    let [first, second] = [pages(100), pages(200)];
    process.on_device(first, 1);
    process.on_device(second, 2);
    let grown = PageRange::from_pages(ARENA_START, PageCount::new(2 * PAGES));
    process.space.mremap(first, grown).unwrap();
    while process.space.has_unread() {
        process.engine.read();
    }
    let place = grown.slice(PAGES, PAGES);
    assert!(change(&process.space, place).is_some(), "it is registered");
    process.space.delay(LATE);
    process.space.mremap(second, place).unwrap();
    while process.space.has_unread() {
        process.engine.read();
    }
    for page in place.iter_pages() {
        assert_eq!(process.value(page), 2, "what has arrived at {page}");
    }
    for page in grown.slice(0, PAGES).iter_pages() {
        assert_eq!(process.value(page), 1, "what has grown at {page}");
    }
}

#[test]
fn what_has_grown_is_unmapped() {
    grown_memory_changes_hands(|space, range| space.munmap(SpaceId::OWN, range));
}

#[test]
fn what_has_grown_moves_on() {
    grown_memory_changes_hands(|space, range| {
        let to = PageRange::from_pages(pages(300).start(), range.pages());
        space.mremap(range, to).unwrap()
    });
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

/// Where pages cannot be moved the engine drops them by address. Before its own
/// drop is reported the program drops the same page and remaps it: what is at
/// the new place are zeros, and not what the engine had copied.
#[test]
fn a_drop_of_the_programs_is_not_taken_for_the_engines() {
    let mut config = config();
    config.capabilities.move_pages = false;
    let process = Process::with(config);
    let [range, elsewhere] = [pages(0), pages(100)];
    let changed = AtomicBool::new(false);
    let (space, engine) = (process.space.clone(), Arc::downgrade(&process.engine));
    process.space.set_hook(Some(Arc::new(move |point| {
        let Some(engine) = engine.upgrade() else {
            return;
        };
        if point == HookPoint::WaitForEvent && !changed.swap(true, Ordering::Relaxed) {
            space.delay(LATE);
            let (part, told) = space.dontneed(SpaceId::OWN, range).unwrap();
            while told.is_some_and(|ticket| space.is_unread(ticket)) {
                engine.read();
            }
            space.zap(SpaceId::OWN, part);
            assert!(space.mremap(range, elsewhere).unwrap().is_some());
        }
        if point.needs_reader() {
            engine.read();
        }
    })));
    process.on_device(range, 1);
    process.space.set_hook(None);
    for page in elsewhere.iter_pages() {
        assert_eq!(process.value(page), 0, "{page} was dropped");
    }
}

/// The program makes a page read-only after the engine has looked: that page
/// cannot be moved any more, so it is copied and dropped. Its neighbours can be,
/// and one is pinned for DMA, which only moving it tells.
#[test]
fn what_is_copied_and_dropped_ends_with_the_mapping() {
    let process = Process::new();
    // One page of a block, three of the next.
    let range = pages(PAGES_PER_BLOCK as u64 - 1);
    let pin = Arc::new(std::sync::Mutex::new(None));
    let (space, pinned) = (process.space.clone(), Arc::clone(&pin));
    let engine = Arc::downgrade(&process.engine);
    process.space.set_hook(Some(Arc::new(move |point| {
        let mut pinned = pinned.lock().unwrap();
        if point == HookPoint::Submit && pinned.is_none() {
            let read_only = Permissions {
                write: false,
                ..Permissions::READ_WRITE
            };
            space.mprotect(range.slice(1, 1), read_only);
            *pinned = Some(space.pin(range.start().plus_pages(PAGES - 1)).unwrap());
        }
        drop(pinned);
        if point.needs_reader()
            && let Some(engine) = engine.upgrade()
        {
            engine.read();
        }
    })));
    process.on_device(range, 1);
    process.space.set_hook(None);
    let pin = pin.lock().unwrap().expect("a page was copied");
    let mut seen = 0;
    let at = process.space.dma(pin, &mut |data| seen = data[0]);
    assert_eq!(at, Some(range.start().plus_pages(PAGES - 1)));
    assert_eq!(seen, 1, "what the DMA reads");
    for page in range.iter_pages() {
        assert_eq!(process.value(page), 1, "{page}");
    }
}

/// While a mapping is being registered, the program moves a part of it away and
/// back again: the kernel registers only what is there in between, and that part
/// must not count as registered.
#[test]
fn what_was_elsewhere_while_its_mapping_was_registered_is_not_watched() {
    let process = Process::new();
    let [first, elsewhere] = [pages(0), pages(100)];
    let mapping = PageRange::from_pages(first.start(), PageCount::new(2 * PAGES));
    process.map(mapping, 1);
    let calls = AtomicU32::new(0);
    let space = process.space.clone();
    process.space.set_hook(Some(Arc::new(move |point| {
        if point == HookPoint::Register {
            let ways = [(first, elsewhere), (elsewhere, first)];
            let way = ways.get(calls.fetch_add(1, Ordering::Relaxed) as usize);
            if let Some(&(from, to)) = way {
                let untold = space.mremap(from, to).unwrap().is_none();
                assert!(untold, "it is not registered");
            }
        }
    })));
    process
        .engine
        .request(Request::Migrate(first.slice(0, 1), DeviceId::new(0)));
    process.space.set_hook(None);
    for page in mapping.iter_pages() {
        assert_eq!(process.value(page), 1, "{page}");
    }
}

/// Memory was registered and, as another mapping has come next to it, is let go
/// again. In between the program has said that it drops some, and does so once
/// that was read: nothing of it may have gone to the device by then.
#[test]
fn a_drop_announced_by_memory_that_is_let_go_is_remembered() {
    let process = Process::new();
    let (range, device) = (pages(0), DeviceId::new(0));
    process.map(range, 1);
    let calls = AtomicU32::new(0);
    let dropped = Arc::new(std::sync::Mutex::new(None));
    let (space, told) = (process.space.clone(), Arc::clone(&dropped));
    process.space.set_hook(Some(Arc::new(move |point| {
        if point == HookPoint::Register && calls.fetch_add(1, Ordering::Relaxed) == 1 {
            let ticket = space.dontneed(SpaceId::OWN, range).unwrap().1;
            *told.lock().unwrap() = Some(ticket.expect("it is registered"));
            space.mmap(MapRequest {
                range: pages(PAGES),
                kind: MemoryKind::PrivateAnonymous,
                page_len: PageCount::ONE,
                foreign: false,
            });
        }
    })));
    process.engine.request(Request::Migrate(range, device));
    process.space.set_hook(None);
    let ticket = dropped.lock().unwrap().expect("it was registered");
    while process.space.is_unread(ticket) {
        process.engine.read();
    }
    process.engine.request(Request::Migrate(range, device));
    process.space.zap(SpaceId::OWN, range);
    for page in range.iter_pages() {
        assert_eq!(process.value(page), 0, "{page} was dropped");
    }
}

/// While a mapping is being registered, the program puts a page of hugetlbfs in its
/// place; and another change is under way, so that what was registered stays so.
/// It is a page of hugetlbfs then, and not many small ones.
#[test]
fn what_is_let_go_is_registered_as_what_it_is() {
    let mut config = config();
    config.frames = 1024;
    // What comes home for a page is that page, or all of one of hugetlbfs.
    config.settings.fault_granule = PageCount::ONE;
    config.settings.readahead = false;
    let process = Process::with(config);
    let block = PageCount::from(PAGES_PER_BLOCK);
    let range = PageRange::from_pages(ARENA_START.plus_pages(block.get()), block);
    let (other, device) = (pages(0), DeviceId::new(0));
    process.on_device(other, 1);
    process.map(range, 2);
    let calls = AtomicU32::new(0);
    let change = Arc::new(std::sync::Mutex::new(None));
    let (space, told) = (process.space.clone(), Arc::clone(&change));
    let engine = Arc::downgrade(&process.engine);
    process.space.set_hook(Some(Arc::new(move |point| {
        if point.needs_reader()
            && let Some(engine) = engine.upgrade()
        {
            engine.read();
        }
        if point == HookPoint::Register && calls.fetch_add(1, Ordering::Relaxed) == 0 {
            let untold = space.munmap(SpaceId::OWN, range).is_none();
            assert!(untold, "it is not registered");
            space.mmap(MapRequest {
                range,
                kind: MemoryKind::HugeTlb,
                page_len: PageCount::from(hmm_types::PAGES_PER_BLOCK),
                foreign: false,
            });
            let ticket = space.dontneed(SpaceId::OWN, other).unwrap().1;
            *told.lock().unwrap() = Some(ticket.expect("it is registered"));
        }
    })));
    process.engine.request(Request::Migrate(range, device));
    let ticket = change.lock().unwrap().expect("it was being registered");
    while process.space.is_unread(ticket) {
        process.engine.read();
    }
    process.space.zap(SpaceId::OWN, other);
    process.engine.check();
    // From the end on: what is filled with zeros is all of it.
    for page in [block.get() - 1, 0] {
        assert_eq!(process.value(range.start().plus_pages(page)), 0);
    }
    process.engine.request(Request::Migrate(range, device));
    assert_eq!(process.space.peek(SpaceId::OWN, range.start()), None);
    for page in range.iter_pages() {
        assert_eq!(process.value(page), 0, "{page}");
    }
}

/// The program has said that it drops pages, and does so only when one of them was
/// touched again and is being copied to the device: who reads it there finds a hole,
/// and must not wait for its own end.
#[test]
fn a_drop_that_comes_under_a_copy_holds_up_nobody() {
    let mut config = config();
    config.capabilities.write_protect = true;
    config.frames = 1024;
    let process = Process::with(config);
    // Copied a few pages at a time.
    let range = PageRange::from_pages(ARENA_START, PageCount::from(PAGES_PER_BLOCK));
    let device = DeviceId::new(0);
    let announced = Arc::new(AtomicBool::new(false));
    let (space, told) = (process.space.clone(), Arc::clone(&announced));
    let engine = Arc::downgrade(&process.engine);
    process.space.set_hook(Some(Arc::new(move |point| {
        if point == HookPoint::Submit && told.swap(false, Ordering::Relaxed) {
            space.zap(SpaceId::OWN, range);
        }
        let Some(engine) = engine.upgrade() else {
            return;
        };
        if point.needs_reader() {
            engine.read();
        }
        if point == HookPoint::WaitForFault {
            engine.work();
        }
    })));
    process.space.mmap(MapRequest {
        range,
        kind: MemoryKind::HugeTlb,
        page_len: PageCount::from(hmm_types::PAGES_PER_BLOCK),
        foreign: false,
    });
    process.engine.request(Request::Migrate(range, device));
    let ticket = process.space.dontneed(SpaceId::OWN, range).unwrap().1;
    let ticket = ticket.expect("it is registered");
    while process.space.is_unread(ticket) {
        process.engine.read();
    }
    assert_eq!(process.value(range.start()), 0);
    announced.store(true, Ordering::Relaxed);
    process.engine.request(Request::Migrate(range, device));
    assert!(!announced.load(Ordering::Relaxed), "it was dropped");
    for page in range.iter_pages() {
        assert_eq!(process.value(page), 0, "{page} was dropped");
    }
}

/// Pages are copied to the device and dropped from the program, which remaps one of
/// them to where another one of them was, before the kernel comes to that: it is
/// dropped there, as it would have been at home, and is on the device.
#[test]
fn what_is_remapped_in_the_range_of_a_drop_is_not_lost() {
    let mut config = config();
    config.capabilities.move_pages = false;
    config.capabilities.write_protect = true;
    let process = Process::with(config);
    let (range, elsewhere) = (pages(0), pages(100).slice(0, 1));
    process.map(range, 1);
    let [second, last] = [range.slice(1, 1), range.slice(PAGES - 1, 1)];
    for (page, value) in [(second, 2), (last, 3)] {
        let fill = &mut |data: &mut hmm_sim::Payload| data.fill(value);
        let own = SpaceId::OWN;
        let touch = process
            .space
            .touch(own, 1, page.start(), Access::Write, fill);
        assert_eq!(touch, Touch::Done);
    }
    let remapped = Arc::new(AtomicBool::new(false));
    let (space, told) = (process.space.clone(), Arc::clone(&remapped));
    let engine = Arc::downgrade(&process.engine);
    process.space.set_hook(Some(Arc::new(move |point| {
        let Some(engine) = engine.upgrade() else {
            return;
        };
        if point.needs_reader() {
            engine.read();
        }
        if point == HookPoint::Discard && !told.swap(true, Ordering::Relaxed) {
            for (from, to) in [(last, elsewhere), (second, last)] {
                let ticket = space.mremap(from, to).unwrap().unwrap();
                while space.is_unread(ticket) {
                    engine.read();
                }
            }
        }
    })));
    process
        .engine
        .request(Request::Migrate(range, DeviceId::new(0)));
    assert!(remapped.load(Ordering::Relaxed), "something was dropped");
    let values = [range.start(), last.start(), elsewhere.start()];
    assert_eq!(values.map(|page| process.value(page)), [1, 2, 3]);
}

/// A page of several blocks is copied to the device, and remapped before the kernel
/// drops it; what takes its place is dropped instead. It is the program's still, all
/// of it, where it is now.
#[test]
fn a_page_of_several_blocks_that_is_remapped_before_its_drop_stays() {
    let mut config = config();
    config.capabilities.write_protect = true;
    config.frames = 4096;
    let process = Process::with(config);
    let page_len = PageCount::from(2 * PAGES_PER_BLOCK);
    let range = PageRange::from_pages(ARENA_START, page_len);
    let elsewhere = PageRange::from_pages(ARENA_START.plus_pages(4 * page_len.get()), page_len);
    let huge = MapRequest {
        range,
        kind: MemoryKind::HugeTlb,
        page_len,
        foreign: false,
    };
    process.space.mmap(huge);
    let value = |index: u64| u8::try_from(index % 251 + 1).unwrap();
    for (index, page) in (0..).zip(range.iter_pages()) {
        let fill = &mut |data: &mut hmm_sim::Payload| data.fill(value(index));
        let touch = process
            .space
            .touch(SpaceId::OWN, 1, page, Access::Write, fill);
        assert_eq!(touch, Touch::Done);
    }
    let remapped = Arc::new(AtomicBool::new(false));
    let (space, told) = (process.space.clone(), Arc::clone(&remapped));
    let engine = Arc::downgrade(&process.engine);
    process.space.set_hook(Some(Arc::new(move |point| {
        let Some(engine) = engine.upgrade() else {
            return;
        };
        if point.needs_reader() {
            engine.read();
        }
        if point == HookPoint::Discard && !told.swap(true, Ordering::Relaxed) {
            let ticket = space.mremap(range, elsewhere).unwrap().unwrap();
            while space.is_unread(ticket) {
                engine.read();
            }
            space.mmap(huge);
        }
    })));
    let device = DeviceId::new(0);
    process.engine.request(Request::Migrate(range, device));
    assert!(
        remapped.load(Ordering::Relaxed),
        "it was about to be dropped"
    );
    let there = |page| process.space.peek(SpaceId::OWN, page).is_some();
    assert!(elsewhere.iter_pages().all(there));
    process.engine.check();
    process.engine.request(Request::Migrate(elsewhere, device));
    assert!(!elsewhere.iter_pages().any(there), "all of it has left");
    for (index, page) in (0..).zip(elsewhere.iter_pages()) {
        assert_eq!(process.value(page), value(index), "{page}");
    }
    assert!(elsewhere.iter_pages().all(there), "all of it is back");
}

/// A handler has read a fault in memory that has nothing away, and does not get to
/// run. Meanwhile other memory is mapped there, and goes to the device: it gets no
/// zeros.
#[test]
fn an_old_fault_puts_no_zeros_where_pages_are_away() {
    let process = Process::new();
    let range = pages(0);
    let grown = PageRange::from_pages(range.end(), PageCount::new(PAGES));
    process.on_device(range, 1);
    let all = PageRange::span(range.start(), grown.end());
    process.space.mremap(range, all).unwrap();
    let look = &mut |_: &mut hmm_sim::Payload| {};
    let page = grown.start();
    let touch = process
        .space
        .touch(SpaceId::OWN, 9, page, Access::Read, look);
    assert_ne!(touch, Touch::Done, "it is registered");
    process.engine.read();

    let changed = AtomicBool::new(false);
    let (space, engine) = (process.space.clone(), Arc::downgrade(&process.engine));
    process.space.set_hook(Some(Arc::new(move |point| {
        let Some(engine) = engine.upgrade() else {
            return;
        };
        if point == HookPoint::Fill && !changed.swap(true, Ordering::Relaxed) {
            let ticket = space.munmap(SpaceId::OWN, grown).expect("it is registered");
            while space.is_unread(ticket) {
                engine.read();
            }
            space.mmap(MapRequest {
                range: grown,
                kind: MemoryKind::PrivateAnonymous,
                page_len: PageCount::ONE,
                foreign: false,
            });
            let fill = &mut |data: &mut hmm_sim::Payload| data.fill(7);
            for page in grown.iter_pages() {
                assert_eq!(
                    space.touch(SpaceId::OWN, 1, page, Access::Write, fill),
                    Touch::Done
                );
            }
            engine.request(Request::Migrate(grown, DeviceId::new(0)));
        }
    })));
    process.engine.work();
    process.space.set_hook(None);
    // Nothing comes in between if the handler has the gate.
    let right = if process.value(grown.start()) == 0 {
        0
    } else {
        7
    };
    for page in grown.iter_pages() {
        assert_eq!(process.value(page), right, "{page}");
    }
}
