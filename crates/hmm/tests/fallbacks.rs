//! The same with kernel facilities switched off: slower, counted, and right.
mod common;

use common::{
    Map, PAGE, WORDS, all_free, engine_of, fetch, fork, nothing_staged, pattern, send, wait,
    watchdog,
};
use hmm::{Disable, Hmm, LossMode, Pointer, StatsSnapshot};

/// A bit of everything; what the engine counted.
fn everything(disable: Disable) -> StatsSnapshot {
    let (hmm, device) = engine_of(Hmm::builder().disable(disable), 16);
    let map = Map::new(1200);
    map.fill(1);
    // A round trip by touch, and one by request.
    send(&hmm, map.range(), &device);
    map.check(1);
    send(&hmm, map.range(), &device);
    fetch(&hmm, map.range());
    map.check(1);
    // Kernels.
    let first = Pointer::new(map.word(0));
    device
        .launch(1200, |context, page| {
            context.fetch_add(first.at(page * WORDS), 1).map(drop)
        })
        .unwrap();
    for page in 0..1200 {
        assert_eq!(
            map.get(page * WORDS),
            pattern(1, page * WORDS).wrapping_add(1)
        );
    }
    // Structural events.
    map.fill(2);
    send(&hmm, map.range(), &device);
    assert!(map.advise(100, 200, libc::MADV_DONTNEED));
    map.check_zero(100, 200);
    map.check_part(0, 100, 2);
    map.fill(3);
    send(&hmm, map.range(), &device);
    let map = map.remap(1200, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, None);
    map.check(3);
    send(&hmm, map.range(), &device);
    map.unmap_part(1000, 200);
    map.check_part(0, 1000, 3);
    // A fork.
    send(&hmm, map.part(0, 1000), &device);
    let child = fork(|| i32::from(map.wrong(0, 1000, 3).is_some()));
    map.fill_part(0, 1000, 4);
    assert_eq!(wait(child), 0, "the child reads something else");
    map.check_part(0, 1000, 4);
    // Exclusive use, if there is such a thing.
    match hmm.exclusive(map.part(0, 10), device.id()) {
        Ok(report) => common::adds_up(&report, map.part(0, 10)),
        Err(error) => println!("exclusive: {error}"),
    }
    map.check_part(0, 10, 4);
    // Four threads at once.
    std::thread::scope(|scope| {
        let (hmm, map, device) = (&hmm, &map, &device);
        for number in 0..4 {
            scope.spawn(move || {
                for round in 0..30 {
                    let part = (number * 250, 250);
                    let _ = hmm.migrate(map.part(part.0, part.1), device.id()).unwrap();
                    map.check_part(part.0, part.1, if round == 0 { 4 } else { 4 + round });
                    map.fill_part(part.0, part.1, 5 + round);
                }
            });
        }
    });
    map.check_part(0, 1000, 34);
    drop(map);
    all_free(&hmm, &device);
    nothing_staged(&hmm);
    let statistics = hmm.statistics();
    println!("{disable:?}: {statistics:#?}");
    hmm.shutdown().unwrap();
    statistics
}

#[test]
fn with_everything_nothing_falls_back() {
    let _dog = watchdog("with_everything_nothing_falls_back", 60);
    let hmm = Hmm::open().unwrap();
    needs_move!(hmm, "pages are copied");
    hmm.shutdown().unwrap();
    let statistics = everything(Disable::default());
    assert_eq!(statistics.fallback_pages, 0);
}

#[test]
fn without_moving_pages_are_copied_and_counted() {
    let _dog = watchdog("without_moving_pages_are_copied_and_counted", 100);
    let statistics = everything(Disable {
        move_pages: true,
        ..Disable::default()
    });
    assert!(statistics.fallback_pages > 0);
}

#[test]
fn without_pagemap_scan_it_works() {
    let _dog = watchdog("without_pagemap_scan_it_works", 100);
    everything(Disable {
        pagemap_scan: true,
        ..Disable::default()
    });
}

#[test]
fn without_procmap_query_it_works() {
    let _dog = watchdog("without_procmap_query_it_works", 100);
    everything(Disable {
        procmap_query: true,
        ..Disable::default()
    });
}

#[test]
fn without_fork_events_everything_is_home_in_time() {
    let _dog = watchdog("without_fork_events_everything_is_home_in_time", 100);
    everything(Disable {
        fork_events: true,
        ..Disable::default()
    });
}

/// Nothing may be away in a fork that is not reported. What a lost device had
/// is lost to the child as well; it must not read zeros.
#[test]
fn without_fork_events_a_process_that_lost_a_device_can_fork() {
    let _dog = watchdog(
        "without_fork_events_a_process_that_lost_a_device_can_fork",
        60,
    );
    let builder = Hmm::builder().disable(Disable {
        fork_events: true,
        ..Disable::default()
    });
    let (hmm, device) = engine_of(builder, 4);
    if !hmm.marks_lost_pages() {
        skip!("this process would end: lost pages cannot be marked without UFFDIO_POISON");
    }
    let (lost, kept) = (Map::new(100), Map::new(100));
    lost.fill(8);
    kept.fill(9);
    send(&hmm, lost.range(), &device);
    device.injector().lose(LossMode::MemoryGone);
    let child = fork(|| i32::from(kept.wrong(0, 100, 9).is_some()));
    assert_eq!(wait(child), 0, "a child that touches nothing of it");
    assert_eq!(hmm.statistics().lost_pages, 100);
    let child = fork(|| i32::from(lost.get(50 * WORDS) == 0));
    assert_eq!(wait(child), -libc::SIGBUS);
    kept.check(9);
    drop(lost);
    hmm.shutdown().unwrap();
}

#[test]
fn without_privilege_it_works() {
    let _dog = watchdog("without_privilege_it_works", 100);
    let disable = Disable {
        privileged: true,
        ..Disable::default()
    };
    let hmm = Hmm::builder().disable(disable).open().unwrap();
    assert!(!hmm.serves_kernel_faults(), "it must say so");
    hmm.shutdown().unwrap();
    everything(disable);
}

#[test]
fn on_an_old_kernel_it_works() {
    let _dog = watchdog("on_an_old_kernel_it_works", 100);
    let statistics = everything(Disable {
        move_pages: true,
        pagemap_scan: true,
        procmap_query: true,
        ..Disable::default()
    });
    assert!(statistics.fallback_pages > 0);
}

#[test]
fn without_anything_it_works_or_says_why_not() {
    let _dog = watchdog("without_anything_it_works_or_says_why_not", 100);
    let disable = Disable {
        move_pages: true,
        pagemap_scan: true,
        procmap_query: true,
        fork_events: true,
        write_protect: true,
        privileged: true,
    };
    let (hmm, device) = engine_of(Hmm::builder().disable(disable), 4);
    let map = Map::new(64);
    map.fill(1);
    match hmm.migrate(map.range(), device.id()) {
        Ok(report) => {
            println!("{report}");
            common::adds_up(&report, map.range());
        }
        Err(error) => println!("{error}"),
    }
    map.check(1);
    assert_eq!(map.bytes(), 64 * PAGE);
    drop(map);
    hmm.shutdown().unwrap();
}

/// Where pages are copied and dropped by address: memory that is remapped while
/// it leaves, and leaves its mapping behind, stays what it is.
#[test]
fn memory_that_is_remapped_while_it_is_copied_is_kept() {
    let _dog = watchdog("memory_that_is_remapped_while_it_is_copied_is_kept", 60);
    let disable = Disable {
        move_pages: true,
        ..Disable::default()
    };
    let (hmm, device) = engine_of(Hmm::builder().disable(disable), 64);
    let since = std::time::Instant::now();
    let mut round = 0;
    while since.elapsed() < std::time::Duration::from_secs(6) {
        round += 1;
        let map = Map::new(64);
        map.fill(round);
        send(&hmm, map.range(), &device);
        map.check(round);
        let range = map.range();
        let ready = std::sync::Barrier::new(2);
        let map = std::thread::scope(|scope| {
            scope.spawn(|| {
                ready.wait();
                let _ = hmm.migrate(range, device.id());
            });
            ready.wait();
            for _ in 0..(round * 7919) % 20_000 {
                std::hint::spin_loop();
            }
            map.remap(64, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, None)
        });
        map.check(round);
        map.fill(round + 1);
        map.check(round + 1);
        let left = Map::adopt(
            std::ptr::with_exposed_provenance_mut(range.start().addr()),
            64,
        );
        drop((map, left));
    }
    println!("{round} rounds");
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}
