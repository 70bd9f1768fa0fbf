//! Devices whose memory the CPU uses in place.

mod common;

use common::{Map, WORDS, adds_up, device, engine, fork, nothing_staged, send, wait, watchdog};
use hmm::{
    Access, ByteCount, DeviceId, Hmm, MirrorEntry, PageRange, PageResidency, Pointer, Reach,
    SoftwareDevice, SoftwareOptions, StayReason,
};

const PAGES: usize = 600;

fn coherent(hmm: &Hmm, mib: u64) -> SoftwareDevice {
    let options = SoftwareOptions::new(ByteCount::mib(mib)).coherent(true);
    hmm.add_software_device(options).expect("a device")
}

fn opened(mib: u64) -> (Hmm, SoftwareDevice) {
    let hmm = Hmm::open().expect("an engine");
    let device = coherent(&hmm, mib);
    (hmm, device)
}

/// Pages of the range that are in the device's coherent memory.
fn there(hmm: &Hmm, range: PageRange, device: DeviceId) -> usize {
    let residency = hmm.residency(range).unwrap();
    let wanted = PageResidency::Coherent(device);
    residency.pages().iter().filter(|&&at| at == wanted).count()
}

/// Every page's first word and one: by the device.
fn add_one(device: &SoftwareDevice, map: &Map, pages: usize) {
    let word = Pointer::new(map.word(0));
    let report = device.launch(pages, |context, page| {
        context.fetch_add(word.at(page * WORDS), 1).map(drop)
    });
    report.unwrap();
}

#[test]
fn neither_side_faults_on_coherent_memory() {
    let _dog = watchdog("neither_side_faults_on_coherent_memory", 60);
    let (hmm, device) = opened(16);
    let map = Map::new(PAGES);
    map.fill(1);
    let report = send(&hmm, map.range(), &device);
    assert_eq!(report.moved.get(), PAGES as u64);
    assert_eq!(there(&hmm, map.range(), device.id()), PAGES);
    assert_eq!(
        hmm.residency(map.range())
            .unwrap()
            .on_device(device.id())
            .get(),
        PAGES as u64
    );
    let faults = hmm.statistics().cpu_faults;
    map.check(1);
    map.fill(2);
    assert_eq!(hmm.statistics().cpu_faults, faults, "the CPU faulted");
    // Both at the same time.
    std::thread::scope(|scope| {
        scope.spawn(|| add_one(&device, &map, PAGES));
        for page in 0..PAGES {
            let word = page * WORDS + 1;
            assert_eq!(map.get(word), common::pattern(2, word));
        }
    });
    for page in 0..PAGES {
        map.set(page * WORDS, map.get(page * WORDS).wrapping_sub(1));
    }
    map.check(2);
    assert_eq!(there(&hmm, map.range(), device.id()), PAGES);

    let again = hmm.migrate(map.range(), device.id()).unwrap();
    assert_eq!(again.already.get(), PAGES as u64, "{again}");
    let back = hmm.evict(map.part(0, 100)).unwrap();
    adds_up(&back, map.part(0, 100));
    assert_eq!(back.moved.get(), 100, "{back}");
    assert_eq!(there(&hmm, map.range(), device.id()), PAGES - 100);
    map.check(2);
    hmm.shutdown().unwrap();
}

#[test]
fn the_device_has_so_much_memory_and_no_more() {
    let _dog = watchdog("the_device_has_so_much_memory_and_no_more", 60);
    let (hmm, device) = opened(2);
    let map = Map::new(PAGES);
    map.fill(3);
    let report = hmm.migrate(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    assert_eq!(report.moved.get(), 512, "{report}");
    let full = |stay: &hmm::StayedRange| stay.reason == StayReason::NoDeviceMemory;
    assert!(report.stayed.iter().all(full), "{report}");
    // What the program drops is room again.
    map.advise(0, 100, libc::MADV_DONTNEED);
    map.unmap_part(100, 100);
    let report = hmm.migrate(map.part(200, 400), device.id()).unwrap();
    assert!(report.is_complete(), "{report}");
    map.check_part(200, 400, 3);
    map.check_zero(0, 100);
    std::mem::forget(map);
    hmm.shutdown().unwrap();
}

#[test]
fn changes_of_mappings_are_followed() {
    let _dog = watchdog("changes_of_mappings_are_followed", 60);
    let (hmm, device) = opened(16);
    let map = Map::new(PAGES);
    map.fill(4);
    send(&hmm, map.range(), &device);
    map.advise(10, 20, libc::MADV_DONTNEED);
    assert_eq!(there(&hmm, map.range(), device.id()), PAGES - 20);
    map.check_zero(10, 20);
    map.fill_part(10, 20, 4);
    let map = map.remap(PAGES * 2, libc::MREMAP_MAYMOVE, None);
    assert_eq!(there(&hmm, map.part(0, PAGES), device.id()), PAGES - 20);
    assert_eq!(there(&hmm, map.part(PAGES, PAGES), device.id()), 0);
    map.check_part(0, PAGES, 4);
    add_one(&device, &map, PAGES);
    for page in 0..PAGES {
        map.set(page * WORDS, map.get(page * WORDS).wrapping_sub(1));
    }
    map.check_part(0, PAGES, 4);
    drop(map);
    hmm.shutdown().unwrap();
}

#[test]
fn data_survives_every_way_between_devices() {
    let _dog = watchdog("data_survives_every_way_between_devices", 60);
    let (hmm, private) = engine(16);
    needs_move!(hmm, "no exclusive use");
    let first = coherent(&hmm, 16);
    let second = coherent(&hmm, 16);
    let map = Map::new(PAGES);
    map.fill(5);
    for device in [&private, &first, &second, &private, &second, &first] {
        send(&hmm, map.range(), device);
        add_one(device, &map, PAGES);
    }
    let exclusive = hmm.exclusive(map.part(0, 100), second.id()).unwrap();
    assert!(exclusive.is_complete(), "{exclusive}");
    assert_eq!(there(&hmm, map.range(), first.id()), PAGES - 100);
    add_one(&second, &map, PAGES);
    for page in 0..PAGES {
        map.set(page * WORDS, map.get(page * WORDS).wrapping_sub(7));
    }
    map.check(5);
    nothing_staged(&hmm);
    assert!(first.remove().unwrap());
    assert_eq!(there(&hmm, map.range(), first.id()), 0);
    map.check(5);
    hmm.shutdown().unwrap();
}

#[test]
fn after_a_fork_the_pages_are_the_systems() {
    let _dog = watchdog("after_a_fork_the_pages_are_the_systems", 60);
    let (hmm, device) = opened(16);
    let map = Map::new(PAGES);
    map.fill(6);
    send(&hmm, map.range(), &device);
    let child = fork(|| {
        map.check(6);
        map.fill(7);
        i32::from(map.wrong(0, PAGES, 7).is_some())
    });
    map.check(6);
    assert_eq!(wait(child), 0);
    map.check(6);
    assert_eq!(there(&hmm, map.range(), device.id()), 0);
    send(&hmm, map.range(), &device);
    assert_eq!(there(&hmm, map.range(), device.id()), PAGES);
    hmm.shutdown().unwrap();
}

#[test]
fn a_mirror_sees_whose_memory_it_is() {
    let _dog = watchdog("a_mirror_sees_whose_memory_it_is", 60);
    let (hmm, mine) = opened(16);
    let other = coherent(&hmm, 16);
    let private = device(&hmm, 16);
    let map = Map::new(5);
    map.fill_part(0, 4, 8);
    send(&hmm, map.part(0, 1), &mine);
    send(&hmm, map.part(1, 1), &other);
    send(&hmm, map.part(2, 1), &private);
    // A page that nobody has touched is zeros on the device.
    send(&hmm, map.part(4, 1), &mine);
    let whose: Vec<_> = hmm
        .snapshot(map.range())
        .unwrap()
        .into_iter()
        .map(|entry| match entry {
            MirrorEntry::System { coherent, .. } => coherent,
            MirrorEntry::Away { residency, .. } => {
                assert_eq!(residency, PageResidency::Device(private.id()));
                Some(private.id())
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let ids = [mine.id(), other.id(), private.id()].map(Some);
    assert_eq!(whose, [ids[0], ids[1], ids[2], None, ids[0]]);
    // The hole can be read in place, and then written by the CPU.
    let launched = mine.launch(1, |context, _| {
        let pages = context.fault_range(map.part(4, 1), Access::Read, Reach::Resident)?;
        assert_eq!(pages.get(), 1);
        Ok(())
    });
    launched.unwrap();
    map.check_zero(4, 1);
    map.set(4 * WORDS, 9);
    assert_eq!(there(&hmm, map.part(4, 1), mine.id()), 1);
    drop(map);
    hmm.shutdown().unwrap();
}
