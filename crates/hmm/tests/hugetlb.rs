//! Pages of hugetlbfs: they leave and come home whole, through everything that a
//! program may do to them. The kernel's pool is filled for these tests, which
//! takes root.
mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{
    HUGE, Map, PAGE, WORDS, adds_up, all_free, device, engine, engine_of, fetch, fork, helper,
    nothing_staged, on_device, role, run, send, signal_of_lost_data, wait, watchdog,
};
use hmm::{Disable, Hmm, LossMode, MirrorEntry, Pointer, SoftwareDevice, StayReason};

fn huge(pages: usize) -> Map {
    huge_with(pages, libc::MAP_PRIVATE)
}

fn huge_with(pages: usize, flags: i32) -> Map {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    Map::with(pages * HUGE, access, flags | libc::MAP_HUGETLB, -1)
}

fn add_by_device(device: &SoftwareDevice, map: &Map, index: usize, value: u64) {
    let at = Pointer::<u64>::new(map.word(index));
    device
        .launch(1, |context, _| context.fetch_add(at.get(), value).map(drop))
        .unwrap();
}

fn end(hmm: Hmm, device: &SoftwareDevice) {
    all_free(&hmm, device);
    nothing_staged(&hmm);
    hmm.shutdown().unwrap();
}

#[test]
fn whole_pages_leave_and_come_home() {
    let _pool = pool!(4);
    let _dog = watchdog("whole_pages_leave_and_come_home", 60);
    let (hmm, device) = engine(16);
    let map = huge(4);
    map.fill(1);
    for round in 0..3 {
        let report = send(&hmm, map.range(), &device);
        assert_eq!(report.moved.get(), map.pages() as u64);
        assert_eq!(report.huge, report.moved);
        assert_eq!(
            on_device(&hmm, map.range(), &device),
            map.pages() as u64,
            "round {round}"
        );
        if round == 1 {
            let report = fetch(&hmm, map.range());
            assert_eq!(report.moved.get(), map.pages() as u64, "{report}");
        }
        map.check(1);
        assert_eq!(on_device(&hmm, map.range(), &device), 0);
    }
    send(&hmm, map.range(), &device);
    add_by_device(&device, &map, 5 * WORDS + 3, 7);
    map.set(0, map.get(0));
    assert_eq!(
        map.get(5 * WORDS + 3),
        common::pattern(1, 5 * WORDS + 3) + 7
    );
    assert!(hmm.statistics().fallback_pages > 0, "they are copied");
    drop(map);
    end(hmm, &device);
}

/// A request for a part is about that part; the page goes whole.
#[test]
fn a_part_of_a_page_takes_all_of_it_along() {
    let _pool = pool!(2);
    let _dog = watchdog("a_part_of_a_page_takes_all_of_it_along", 60);
    let (hmm, device) = engine(16);
    let map = huge(2);
    map.fill(2);
    let part = map.part(HUGE - 3, 7);
    let report = hmm.migrate(part, device.id()).unwrap();
    adds_up(&report, part);
    assert!(report.is_complete(), "{report}");
    assert_eq!(on_device(&hmm, map.range(), &device), 2 * HUGE as u64);
    let report = fetch(&hmm, map.part(HUGE + 100, 1));
    assert_eq!(report.moved.get(), 1, "{report}");
    assert_eq!(on_device(&hmm, map.range(), &device), HUGE as u64);
    map.check(2);
    // A kernel's own fault brings what it touches.
    add_by_device(&device, &map, 9 * WORDS, 0);
    assert_eq!(on_device(&hmm, map.part(0, HUGE), &device), HUGE as u64);
    map.check(2);
    drop(map);
    end(hmm, &device);
}

#[test]
fn what_nobody_has_touched_is_zeros() {
    let _pool = pool!(6);
    let _dog = watchdog("what_nobody_has_touched_is_zeros", 60);
    let (hmm, device) = engine(16);
    let map = huge(6);
    map.fill_part(HUGE, HUGE, 3);
    send(&hmm, map.part(0, 4 * HUGE), &device);
    assert_eq!(on_device(&hmm, map.range(), &device), 4 * HUGE as u64);
    map.check_zero(0, HUGE);
    map.check_part(HUGE, HUGE, 3);
    map.check_zero(2 * HUGE, HUGE);
    // Watched now, and still a hole: the CPU first, then a device.
    map.check_zero(5 * HUGE, HUGE);
    map.set(4 * HUGE * WORDS, 9);
    add_by_device(&device, &map, 4 * HUGE * WORDS, 1);
    assert_eq!(map.get(4 * HUGE * WORDS), 10);
    // Dropped by the program: zeros again, wherever they were.
    map.fill(4);
    send(&hmm, map.part(0, 3 * HUGE), &device);
    assert!(map.advise(HUGE, 3 * HUGE, libc::MADV_DONTNEED));
    map.check_part(0, HUGE, 4);
    map.check_zero(HUGE, 3 * HUGE);
    map.check_part(4 * HUGE, HUGE, 4);
    drop(map);
    end(hmm, &device);
}

#[test]
fn pages_are_unmapped_and_remapped_while_away() {
    let _pool = pool!(6);
    let _dog = watchdog("pages_are_unmapped_and_remapped_while_away", 60);
    let (hmm, device) = engine(16);
    let map = huge(6);
    map.fill(5);
    send(&hmm, map.part(0, 5 * HUGE), &device);
    map.unmap_part(4 * HUGE, 2 * HUGE);
    let (at, pages) = (map.at(), 4 * HUGE);
    map.leak();
    let map = Map::adopt(at, pages);
    assert_eq!(on_device(&hmm, map.range(), &device), 4 * HUGE as u64);
    // Room for the new place that is aligned as the kernel wants it.
    let room = Map::aligned(4 * HUGE, false);
    let to = room.at();
    drop(room);
    let map = map.remap(pages, libc::MREMAP_MAYMOVE, Some(to));
    assert_eq!(map.at(), to);
    assert_eq!(on_device(&hmm, map.range(), &device), 4 * HUGE as u64);
    map.check(5);
    send(&hmm, map.range(), &device);
    add_by_device(&device, &map, 77, 1);
    map.set(77, map.get(77) - 1);
    map.check(5);
    drop(map);
    end(hmm, &device);
}

/// Threads count in pages that go back and forth: no write is lost.
#[test]
fn writers_race_with_migrations() {
    const TIME: Duration = Duration::from_secs(1);
    let _pool = pool!(4);
    let _dog = watchdog("writers_race_with_migrations", 120);
    let (hmm, device) = engine(16);
    let map = huge(4);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let by_device = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..3usize {
            let (map, stop, written) = (&map, &stop, &written);
            scope.spawn(move || {
                let mut count = 0usize;
                while !stop.load(Ordering::Relaxed) {
                    let index = (count * 577) % map.pages();
                    // A word of this thread's own in each page.
                    let word = index * WORDS + number;
                    map.set(word, map.get(word) + 1);
                    count += 1;
                }
                written.fetch_add(count as u64, Ordering::Relaxed);
            });
        }
        let (device, map, stop, by_device) = (&device, &map, &stop, &by_device);
        scope.spawn(move || {
            let mut index = 0;
            while !stop.load(Ordering::Relaxed) {
                add_by_device(device, map, (index % map.pages()) * WORDS + 5, 1);
                by_device.fetch_add(1, Ordering::Relaxed);
                index += 311;
            }
        });
        let start = Instant::now();
        let mut round = 0;
        while start.elapsed() < TIME || round < 3 {
            let report = hmm.migrate(map.range(), device.id()).unwrap();
            adds_up(&report, map.range());
            if round % 3 == 0 {
                fetch(&hmm, map.part((round % 4) * HUGE, HUGE));
            }
            round += 1;
        }
        println!("{round} rounds");
        stop.store(true, Ordering::Relaxed);
    });
    let sum = |word: usize| {
        (0..map.pages())
            .map(|page| map.get(page * WORDS + word))
            .sum::<u64>()
    };
    assert_eq!(sum(0) + sum(1) + sum(2), written.into_inner());
    assert_eq!(sum(5), by_device.into_inner());
    drop(map);
    end(hmm, &device);
}

/// Each of two threads drops a page of its own again and again, while others look at
/// it and it migrates: a drop is announced before it is done, so it may come at any
/// moment of that.
#[test]
fn droppers_race_with_migrations() {
    /// By time, as a drop takes long in an emulated machine.
    const TIME: Duration = Duration::from_secs(1);
    let _pool = pool!(6);
    let _dog = watchdog("droppers_race_with_migrations", 120);
    let (hmm, device) = engine(16);
    let map = huge(2);
    let (running, late) = (AtomicUsize::new(2), Instant::now() + TIME);
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (map, running) = (&map, &running);
            scope.spawn(move || {
                let (first, words) = (number * HUGE, [3, 200 * WORDS, 511 * WORDS + 9]);
                for round in 1.. {
                    if Instant::now() > late {
                        break;
                    }
                    for word in words {
                        map.set(first * WORDS + word, round);
                    }
                    for word in words {
                        assert_eq!(map.get(first * WORDS + word), round);
                    }
                    assert!(map.advise(first, HUGE, libc::MADV_DONTNEED));
                    for word in words {
                        assert_eq!(map.get(first * WORDS + word), 0, "round {round}");
                    }
                }
                running.fetch_sub(1, Ordering::Relaxed);
            });
            scope.spawn(move || {
                while running.load(Ordering::Relaxed) > 0 {
                    std::hint::black_box(map.get((number * HUGE + 77) * WORDS));
                }
            });
        }
        while running.load(Ordering::Relaxed) > 0 {
            let report = hmm.migrate(map.range(), device.id()).unwrap();
            adds_up(&report, map.range());
        }
    });
    drop(map);
    end(hmm, &device);
}

#[test]
fn a_child_has_what_the_parent_had() {
    let _pool = pool!(14);
    let _dog = watchdog("a_child_has_what_the_parent_had", 60);
    let (hmm, device) = engine(16);
    let map = huge(4);
    map.fill(6);
    send(&hmm, map.part(0, 3 * HUGE), &device);
    let child = fork(|| {
        let found = map.wrong(0, map.pages(), 6).is_none();
        map.fill_part(HUGE, HUGE, 8);
        let kept = map.wrong(HUGE, HUGE, 8).is_none() && map.wrong(0, HUGE, 6).is_none();
        i32::from(!(found && kept))
    });
    // The parent goes on at once, and its device as well.
    map.fill_part(0, HUGE, 7);
    add_by_device(&device, &map, 2 * HUGE * WORDS, 1);
    assert_eq!(wait(child), 0);
    map.check_part(0, HUGE, 7);
    map.check_part(HUGE, HUGE, 6);
    assert_eq!(
        map.get(2 * HUGE * WORDS),
        common::pattern(6, 2 * HUGE * WORDS) + 1
    );
    // A child that looks at nothing gets everything in the background.
    send(&hmm, map.range(), &device);
    let child = fork(|| {
        // SAFETY: only sleeps.
        unsafe { libc::usleep(300_000) };
        0
    });
    assert_eq!(wait(child), 0);
    drop(map);
    end(hmm, &device);
}

/// With what older kernels have.
#[test]
fn older_kernels_move_huge_pages_as_well() {
    let _pool = pool!(14);
    let _dog = watchdog("older_kernels_move_huge_pages_as_well", 60);
    let without = Disable::default();
    let kernels = [
        Disable {
            move_pages: true,
            ..without
        },
        Disable {
            move_pages: true,
            pagemap_scan: true,
            procmap_query: true,
            ..without
        },
    ];
    for disable in kernels {
        let (hmm, device) = engine_of(Hmm::builder().disable(disable), 16);
        let map = huge(4);
        map.fill_part(0, 3 * HUGE, 13);
        for round in 0..2 {
            let report = send(&hmm, map.range(), &device);
            assert_eq!(report.moved.get(), map.pages() as u64, "{disable:?}");
            let child = fork(|| {
                let found = map.wrong(0, 3 * HUGE, 13).is_none();
                i32::from(!(found && map.not_zero(3 * HUGE, HUGE).is_none()))
            });
            assert_eq!(wait(child), 0, "{disable:?}, round {round}");
            map.check_part(0, 3 * HUGE, 13);
            map.check_zero(3 * HUGE, HUGE);
        }
        send(&hmm, map.range(), &device);
        assert!(map.advise(HUGE, HUGE, libc::MADV_DONTNEED));
        fetch(&hmm, map.part(2 * HUGE, HUGE));
        map.check_part(0, HUGE, 13);
        map.check_zero(HUGE, HUGE);
        map.fill_part(HUGE, HUGE, 13);
        send(&hmm, map.range(), &device);
        map.check_part(0, 3 * HUGE, 13);
        drop(map);
        end(hmm, &device);
    }
}

/// The data of a page is lost with its device: touching it is a SIGBUS, and a
/// request for a part of it is told about that part.
#[test]
fn a_lost_device_loses_whole_pages() {
    let name = "a_lost_device_loses_whole_pages";
    let _pool = match role() {
        Some(_) => None,
        None => Some(pool!(2)),
    };
    let _dog = watchdog("a_lost_device_loses_whole_pages", 60);
    if role().is_none() {
        let (hmm, _) = engine(1);
        let expected = signal_of_lost_data(&hmm);
        hmm.shutdown().unwrap();
        let (status, text) = run(helper(name, "touches"), 30);
        let status = status.expect("the helper ends");
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(expected), "{status}: {text}");
        return;
    }
    let (hmm, device) = engine(16);
    let map = huge(2);
    map.fill(16);
    send(&hmm, map.range(), &device);
    device.injector().lose(LossMode::MemoryGone);
    let part = map.part(100, 1);
    adds_up(&hmm.evict(part).unwrap(), part);
    println!("read {}", map.get(5));
}

/// Small pages right below huge ones, all away: a child that touches the small
/// ones first gets those, and then the huge ones as a whole.
#[test]
fn small_and_huge_neighbours_come_to_a_child() {
    let _pool = pool!(12);
    let _dog = watchdog("small_and_huge_neighbours_come_to_a_child", 60);
    let (hmm, device) = engine(32);
    let room = Map::aligned(6 * HUGE, false);
    let at = room.page(HUGE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_HUGETLB;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: in the middle of memory that is this test's own.
    let got = unsafe { libc::mmap(at.cast(), 4 * HUGE * PAGE, access, flags, -1, 0) };
    assert_eq!(got, at.cast());
    let (below, above) = (room.part(HUGE - 16, 16), room.part(HUGE, 4 * HUGE));
    room.fill_part(HUGE - 16, 16 + 4 * HUGE, 17);
    send(&hmm, below, &device);
    send(&hmm, above, &device);
    let child = fork(|| i32::from(room.wrong(HUGE - 16, 16 + 4 * HUGE, 17).is_some()));
    assert_eq!(wait(child), 0);
    room.check_part(HUGE - 16, 16 + 4 * HUGE, 17);
    drop(room);
    end(hmm, &device);
}

/// A child that can get no page holds up nobody else.
#[test]
fn a_child_without_a_page_holds_up_nobody() {
    let _pool = pool!(2);
    let _dog = watchdog("a_child_without_a_page_holds_up_nobody", 60);
    let (hmm, device) = engine(16);
    let (map, other) = (huge(2), Map::new(64));
    map.fill(18);
    send(&hmm, map.range(), &device);
    let child = fork(|| {
        // SAFETY: only sleeps.
        unsafe { libc::sleep(1000) };
        0
    });
    for round in 0..20 {
        other.fill(round);
        let since = std::time::Instant::now();
        send(&hmm, other.range(), &device);
        other.check(round);
        assert!(
            since.elapsed() < Duration::from_secs(5),
            "{:?}",
            since.elapsed()
        );
    }
    // SAFETY: this test's own child.
    unsafe { libc::kill(child, libc::SIGKILL) };
    assert_eq!(wait(child), -libc::SIGKILL);
    map.check(18);
    drop((map, other));
    end(hmm, &device);
}

/// Before a fork that is not reported everything has to come home, for which the
/// kernel may have no page: so nothing leaves.
#[test]
fn without_fork_events_huge_pages_stay() {
    let _pool = pool!(2);
    let _dog = watchdog("without_fork_events_huge_pages_stay", 60);
    let disable = Disable {
        fork_events: true,
        ..Disable::default()
    };
    let (hmm, device) = engine_of(Hmm::builder().disable(disable), 16);
    let map = huge(2);
    map.fill(15);
    let report = hmm.migrate(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    assert_eq!(report.stayed[0].reason, StayReason::HugeTlb, "{report}");
    add_by_device(&device, &map, 7, 1);
    assert_eq!(map.get(7), common::pattern(15, 7) + 1);
    drop(map);
    end(hmm, &device);
}

/// A mirror sees huge pages, here and on the device, shared ones as well.
#[test]
fn a_mirror_sees_huge_pages() {
    let _pool = pool!(6);
    let _dog = watchdog("a_mirror_sees_huge_pages", 60);
    mirrors_huge_pages(Disable::default());
}

#[test]
fn a_mirror_sees_huge_pages_without_pagemap_scan() {
    let _pool = pool!(6);
    let _dog = watchdog("a_mirror_sees_huge_pages_without_pagemap_scan", 60);
    mirrors_huge_pages(Disable {
        pagemap_scan: true,
        ..Disable::default()
    });
}

fn mirrors_huge_pages(disable: Disable) {
    let (hmm, device) = engine_of(Hmm::builder().disable(disable), 16);
    let (map, shared) = (huge(3), huge_with(2, libc::MAP_SHARED));
    map.fill_part(0, 2 * HUGE, 12);
    shared.fill(12);
    send(&hmm, map.part(HUGE, HUGE), &device);
    let here = |entry: &MirrorEntry| {
        matches!(
            entry,
            MirrorEntry::System {
                write: true,
                huge: true,
                ..
            }
        )
    };
    let entries = hmm.snapshot(map.range()).unwrap();
    assert!(entries[..HUGE].iter().all(here), "{:?}", entries[0]);
    assert!(
        entries[HUGE..2 * HUGE]
            .iter()
            .all(|entry| matches!(entry, MirrorEntry::Away { huge: true, .. })),
        "{:?}",
        entries[HUGE]
    );
    assert!(
        entries[2 * HUGE..]
            .iter()
            .all(|entry| *entry == MirrorEntry::None),
        "{:?}",
        entries[2 * HUGE]
    );
    let entries = hmm.snapshot(shared.range()).unwrap();
    assert!(entries.iter().all(here), "{:?}", entries[0]);
    drop((map, shared));
    end(hmm, &device);
}

/// The kernel has no page left to put the data into: it stays where it is, who
/// touches it waits, and has it as soon as there is one.
#[test]
fn an_empty_pool_loses_nothing() {
    let _pool = pool!(3);
    let _dog = watchdog("an_empty_pool_loses_nothing", 60);
    let (hmm, device) = engine(16);
    let map = huge_with(2, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    map.fill(9);
    send(&hmm, map.range(), &device);
    let taken = huge_with(3, libc::MAP_PRIVATE);
    taken.fill(1);
    let report = hmm.evict(map.range()).unwrap();
    adds_up(&report, map.range());
    assert_eq!(report.stayed_pages, map.range().pages(), "{report}");
    assert!(
        report
            .stayed
            .iter()
            .all(|stay| stay.reason == StayReason::NoSystemMemory),
        "{report}"
    );
    assert_eq!(on_device(&hmm, map.range(), &device), 2 * HUGE as u64);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            map.check(9);
            done.store(true, Ordering::Release);
        });
        std::thread::sleep(Duration::from_millis(300));
        assert!(!done.load(Ordering::Acquire), "there is no page for it");
        drop(taken);
    });
    assert!(done.load(Ordering::Acquire));
    drop(map);
    end(hmm, &device);
}

#[test]
fn pages_go_from_device_to_device_and_make_room() {
    let _pool = pool!(4);
    let _dog = watchdog("pages_go_from_device_to_device_and_make_room", 60);
    let (hmm, first) = engine(5);
    let second = device(&hmm, 16);
    let map = huge(4);
    map.fill(10);
    for page in 0..4 {
        send(&hmm, map.part(page * HUGE, HUGE), &first);
    }
    let away = on_device(&hmm, map.range(), &first);
    assert_eq!(away, 2 * HUGE as u64, "5 MiB hold two of them");
    send(&hmm, map.range(), &second);
    assert_eq!(on_device(&hmm, map.range(), &second), 4 * HUGE as u64);
    map.check(10);
    all_free(&hmm, &second);
    drop(map);
    end(hmm, &first);
}

/// What others may have as well stays, and devices use it in place.
#[test]
fn shared_pages_are_used_in_place() {
    let _pool = pool!(4);
    let _dog = watchdog("shared_pages_are_used_in_place", 60);
    let (hmm, device) = engine(16);
    let map = huge_with(2, libc::MAP_SHARED);
    map.fill(11);
    let report = hmm.migrate(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    assert!(
        report
            .stayed
            .iter()
            .all(|stay| stay.reason == StayReason::HugeTlb)
            && report.moved.get() == 0,
        "{report}"
    );
    add_by_device(&device, &map, 3, 4);
    assert_eq!(map.get(3), common::pattern(11, 3) + 4);
    assert_eq!(map.bytes(), 2 * HUGE * PAGE);
    drop(map);
    end(hmm, &device);
}
