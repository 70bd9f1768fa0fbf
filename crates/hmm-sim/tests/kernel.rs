//! The simulated kernel and device keep to the rules of the real ones.

use hmm_hal::{AddressSpace, Device, DeviceError, Event, SpaceId, Stop, Transfer};
use hmm_sim::{
    ARENA_START, MapRequest, Rates, SIM_PAGE_BYTES, SimConfig, SimDevice, SimSpace, Touch,
};
use hmm_types::{Access, MemoryKind, PAGES_PER_BLOCK, PageCount, PageRange, Permissions, VirtAddr};

fn config() -> SimConfig {
    let mut config = SimConfig::from_seed(1, 1);
    config.capabilities.move_pages = true;
    config.capabilities.fork_events = true;
    config.capabilities.write_protect = true;
    config.rates = Rates::default();
    config
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::from_pages(ARENA_START.plus_pages(first), PageCount::new(count))
}

/// A space with sixteen registered pages, page n filled with n + 1.
fn space() -> SimSpace {
    let space = SimSpace::new(&config());
    space.mmap(MapRequest {
        range: pages(0, 16),
        kind: MemoryKind::PrivateAnonymous,
        page_len: PageCount::ONE,
        foreign: false,
    });
    for (index, page) in (1..).zip(pages(0, 16).iter_pages()) {
        assert_eq!(write(&space, page, index), Touch::Done);
    }
    space.register(pages(0, 16)).unwrap();
    space
}

fn write(space: &SimSpace, page: VirtAddr, value: u8) -> Touch {
    space.touch(SpaceId::OWN, 1, page, Access::Write, &mut |data| {
        data.fill(value)
    })
}

fn read_all(space: &SimSpace) -> Vec<Event> {
    let mut all = Vec::new();
    while space.has_unread() {
        all.extend(space.read_event());
    }
    all
}

fn staging(space: &SimSpace) -> VirtAddr {
    space.staging().small.start()
}

#[test]
fn a_page_moves_out_and_back_and_who_waits_is_woken() {
    let space = space();
    assert_eq!(space.move_pages(pages(3, 2), staging(&space)).stop, None);
    assert_eq!(write(&space, pages(3, 1).start(), 9), Touch::Stopped);
    assert!(matches!(read_all(&space)[..], [Event::Fault { .. }]));
    assert!(read_all(&space).is_empty(), "a fault is told once");
    let from = PageRange::from_pages(staging(&space), PageCount::new(2));
    let back = space.move_pages(from, pages(3, 1).start());
    assert_eq!((back.done, back.stop), (PageCount::new(2), None));
    assert_eq!(
        space.peek(SpaceId::OWN, pages(4, 1).start()),
        Some([5; SIM_PAGE_BYTES])
    );
    assert_eq!(write(&space, pages(3, 1).start(), 9), Touch::Stopped);
    space.wake(SpaceId::OWN, pages(3, 1));
    assert_eq!(write(&space, pages(3, 1).start(), 9), Touch::Done);
}

#[test]
fn an_unread_event_stops_moves_both_ways() {
    let space = space();
    assert_eq!(space.move_pages(pages(0, 1), staging(&space)).stop, None);
    let ticket = space.munmap(SpaceId::OWN, pages(8, 1)).unwrap();
    assert_eq!(
        space.move_pages(pages(1, 1), staging(&space)).stop,
        Some(Stop::Again)
    );
    assert!(!space.is_quiet());
    let from = PageRange::from_pages(staging(&space), PageCount::ONE);
    assert_eq!(
        space.move_pages(from, pages(0, 1).start()).stop,
        Some(Stop::Again)
    );
    assert_eq!(
        space.zero_pages(SpaceId::OWN, pages(0, 1)).stop,
        Some(Stop::Again)
    );
    assert!(space.is_unread(ticket));
    let unmap = Event::Unmap {
        space: SpaceId::OWN,
        range: pages(8, 1),
    };
    assert_eq!(read_all(&space), [unmap]);
    assert!(space.is_quiet());
    assert_eq!(space.move_pages(from, pages(0, 1).start()).stop, None);
}

#[test]
fn what_may_not_move_is_refused() {
    let space = space();
    let to = staging(&space);
    let pin = space.pin(pages(1, 1).start()).unwrap();
    let progress = space.move_pages(pages(0, 4), to);
    assert_eq!(
        (progress.done, progress.stop),
        (PageCount::ONE, Some(Stop::Busy))
    );
    space.unpin(pin);
    assert_eq!(space.move_pages(pages(1, 1), to).stop, Some(Stop::Exists));
    space.mprotect(
        pages(2, 1),
        Permissions {
            write: false,
            ..Permissions::READ_WRITE
        },
    );
    assert_eq!(
        space.move_pages(pages(2, 1), to.plus_pages(2)).stop,
        Some(Stop::Incompatible)
    );
    let (child, _) = space.fork();
    read_all(&space);
    assert_eq!(
        space.move_pages(pages(5, 1), to.plus_pages(5)).stop,
        Some(Stop::Busy)
    );
    space.exit(child);
    assert_eq!(
        space.move_pages(pages(5, 1), to.plus_pages(5)).stop,
        Some(Stop::Busy)
    );
    space.unshare(pages(5, 1)).unwrap();
    assert_eq!(space.move_pages(pages(5, 1), to.plus_pages(5)).stop, None);
}

#[test]
fn a_child_has_what_was_there_and_stops_at_holes() {
    let space = space();
    assert_eq!(space.move_pages(pages(7, 1), staging(&space)).stop, None);
    let (child, ticket) = space.fork();
    assert!(ticket.is_some());
    assert_eq!(write(&space, pages(0, 1).start(), 99), Touch::Done);
    assert_eq!(
        space.peek(child, pages(0, 1).start()),
        Some([1; SIM_PAGE_BYTES])
    );
    let hole = pages(7, 1);
    let touch = space.touch(child, 2, hole.start(), Access::Read, &mut |_| {});
    assert_eq!(touch, Touch::Stopped);
    read_all(&space);
    assert_eq!(space.copy_pages(child, staging(&space), hole).stop, None);
    assert_eq!(space.peek(child, hole.start()), Some([8; SIM_PAGE_BYTES]));
    assert_eq!(
        space.copy_pages(child, staging(&space), hole).stop,
        Some(Stop::Exists)
    );
    space.exit(child);
    assert_eq!(
        space.copy_pages(child, staging(&space), hole).stop,
        Some(Stop::Gone)
    );
}

#[test]
fn protected_and_poisoned_pages_stop_their_users() {
    let mut config = config();
    config.poison = true;
    let space = SimSpace::new(&config);
    let page = pages(0, 1);
    space.mmap(MapRequest {
        range: page,
        kind: MemoryKind::PrivateAnonymous,
        page_len: PageCount::ONE,
        foreign: false,
    });
    assert_eq!(write(&space, page.start(), 1), Touch::Done);
    space.register(page).unwrap();
    assert_eq!(space.write_protect(page, true).stop, None);
    assert_eq!(write(&space, page.start(), 2), Touch::Stopped);
    assert_eq!(space.write_protect(page, false).stop, None);
    assert_eq!(write(&space, page.start(), 2), Touch::Done);
    space.zap(SpaceId::OWN, page);
    assert_eq!(space.poison_pages(SpaceId::OWN, page).stop, None);
    assert_eq!(write(&space, page.start(), 3), Touch::Sigbus);
}

#[test]
fn a_whole_huge_page_stays_huge() {
    let space = SimSpace::new(&config());
    let slot = space.staging().small.slice(0, PAGES_PER_BLOCK as u64);
    assert!(space.provision(slot));
    let range = pages(0, PAGES_PER_BLOCK as u64);
    space.mmap(MapRequest {
        range,
        kind: MemoryKind::PrivateAnonymous,
        page_len: PageCount::ONE,
        foreign: false,
    });
    space.register(range).unwrap();
    assert_eq!(space.move_pages(slot, range.start()).stop, None);
    let mut spans = Vec::new();
    space
        .presence(range, &mut |span, presence| spans.push((span, presence)))
        .unwrap();
    assert_eq!(spans.len(), 1);
}

#[test]
fn a_device_copies_through_its_frames() {
    let space = space();
    let device = SimDevice::new(&config(), 0, &space);
    let frames = device.allocate(PageCount::ONE).unwrap();
    let host = pages(2, 1).start();
    let fence = device
        .submit(&[Transfer::ToDevice { host, frames }])
        .unwrap();
    device.wait(fence).unwrap();
    device.map(pages(2, 1), frames, Access::Read).unwrap();
    let mut seen = 0;
    assert!(device.touch(host, Access::Read, &mut |data| seen = data[0]));
    assert_eq!(seen, 3);
    assert!(
        !device.touch(host, Access::Write, &mut |_| {}),
        "mapped for reading"
    );
    device.map(pages(2, 1), frames, Access::Write).unwrap();
    assert!(device.touch(host, Access::Write, &mut |data| data[0] = 77));
    let bounce = space.bounce(0).start();
    let fence = device
        .submit(&[Transfer::ToHost {
            frames,
            host: bounce,
        }])
        .unwrap();
    device.wait(fence).unwrap();
    assert_eq!(
        space.peek(SpaceId::OWN, bounce).map(|data| data[0]),
        Some(77)
    );
    assert!(device.check_empty().is_err());
    device.unmap(pages(2, 1));
    device.free(frames);
    device.check_empty().unwrap();
    device.lose();
    assert_eq!(device.allocate(PageCount::ONE), Err(DeviceError::Lost));
}

#[test]
#[should_panic(expected = "freed while it is mapped")]
fn a_mapped_frame_is_not_freed() {
    let space = space();
    let device = SimDevice::new(&config(), 0, &space);
    let frames = device.allocate(PageCount::ONE).unwrap();
    device.map(pages(0, 1), frames, Access::Read).unwrap();
    device.free(frames);
}

#[test]
#[should_panic(expected = "which is not there")]
fn missing_engine_memory_is_not_copied() {
    let space = space();
    space.copy_pages(SpaceId::OWN, staging(&space), pages(0, 1));
}
