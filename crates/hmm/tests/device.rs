//! Kernels on a program's own memory, and devices that fail: an error is an
//! error value, data survives what can be survived, and the process lives.
mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use common::{
    Map, PAGE, WORDS, adds_up, all_free, device, engine, helper, nothing_staged, on_device,
    pattern, role, run, send, signal_of_lost_data, watchdog,
};
use hmm::{FailAt, KernelError, LaunchError, LossMode, PageResidency, Pointer, StayReason};

/// What the text of an access error says, for comparison.
fn fault_of(error: &LaunchError) -> String {
    match error {
        LaunchError::Kernel { error, .. } => format!("{error:?}"),
        other => panic!("no error of a kernel: {other}"),
    }
}

#[repr(C)]
struct Node {
    value: u64,
    next: *mut Node,
    ballast: [u64; 30],
}

#[test]
fn a_kernel_walks_and_changes_a_linked_list() {
    let _dog = watchdog("a_kernel_walks_and_changes_a_linked_list", 60);
    let (hmm, device) = engine(32);
    let mut head: *mut Node = std::ptr::null_mut();
    for value in 0..20_000u64 {
        head = Box::into_raw(Box::new(Node {
            value,
            next: head,
            ballast: [value; 30],
        }));
    }
    let start = Pointer::new(head);
    let sum = AtomicU64::new(0);
    device
        .launch(1, |context, _| {
            let mut at = start.get();
            while !at.is_null() {
                let value = context.load(at.cast::<u64>())?;
                sum.fetch_add(value, Ordering::Relaxed);
                context.store(at.cast::<u64>(), value + 1)?;
                at = context.load(
                    at.wrapping_byte_add(std::mem::offset_of!(Node, next))
                        .cast::<*mut Node>(),
                )?;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(sum.into_inner(), 20_000 * 19_999 / 2);
    let mut expected = 20_000;
    while !head.is_null() {
        // SAFETY: made by `Box::into_raw` above, and freed once.
        let node = unsafe { Box::from_raw(head) };
        assert_eq!(node.value, expected);
        assert!(node.ballast.iter().all(|&word| word == expected - 1));
        expected -= 1;
        head = node.next;
    }
    assert!(hmm.statistics().device_faults > 0);
    hmm.shutdown().unwrap();
}

#[test]
fn bad_pointers_in_a_kernel_are_errors() {
    let _dog = watchdog("bad_pointers_in_a_kernel_are_errors", 60);
    let (hmm, device) = engine(8);
    let none = Map::with(1, libc::PROT_NONE, libc::MAP_PRIVATE, -1);
    let bad: [(&str, usize); 5] = [
        ("null", 0),
        ("near null", 8),
        ("unmapped", 0x1000_0000),
        ("kernel", 0xffff_ffff_8000_0000),
        ("PROT_NONE", none.at() as usize),
    ];
    for (what, address) in bad {
        let at = Pointer::<u64>::new(std::ptr::with_exposed_provenance_mut(address));
        for write in [false, true] {
            let error = device
                .launch(3, |context, _| {
                    if write {
                        context.store(at.get(), 1)
                    } else {
                        context.load(at.get()).map(drop)
                    }
                })
                .expect_err(what);
            println!("{what}: {error}");
            let error = fault_of(&error);
            assert!(
                error.contains("NotMapped") || (write && error.contains("ReadOnly")),
                "{what}: {error}"
            );
        }
    }
    let end = Pointer::<[u64; 4]>::new(std::ptr::with_exposed_provenance_mut(usize::MAX - 7));
    let error = device
        .launch(1, |context, _| context.load(end.get()).map(drop))
        .unwrap_err();
    assert!(
        matches!(
            error,
            LaunchError::Kernel {
                error: KernelError::Overflow { .. },
                ..
            }
        ),
        "{error}"
    );
    let odd = Pointer::<u64>::new(std::ptr::with_exposed_provenance_mut(0x1001));
    let error = device
        .launch(1, |context, _| context.fetch_add(odd.get(), 1).map(drop))
        .unwrap_err();
    assert!(
        matches!(
            error,
            LaunchError::Kernel {
                error: KernelError::Unaligned { .. },
                ..
            }
        ),
        "{error}"
    );
    // And the device still works.
    let map = Map::new(4);
    let first = Pointer::new(map.word(0));
    device
        .launch(4, |context, page| context.store(first.at(page * WORDS), 7))
        .unwrap();
    assert!((0..4).all(|page| map.get(page * WORDS) == 7));
    drop(map);
    hmm.shutdown().unwrap();
}

#[test]
fn writes_to_read_only_memory_are_refused() {
    let _dog = watchdog("writes_to_read_only_memory_are_refused", 60);
    let (hmm, device) = engine(8);
    // Once with pages at home, once on the device before they are protected.
    for away in [false, true] {
        let map = Map::new(8);
        map.fill(1);
        if away {
            send(&hmm, map.range(), &device);
        }
        map.protect(0, 8, libc::PROT_READ);
        let first = Pointer::new(map.word(0));
        let error = device
            .launch(1, |context, _| context.store(first.at(5), 99))
            .expect_err("a store to read-only memory");
        assert!(
            fault_of(&error).contains("ReadOnly"),
            "away: {away}: {error}"
        );
        let error = device
            .launch(1, |context, _| context.fetch_add(first.at(5), 99).map(drop))
            .expect_err("an atomic on read-only memory");
        assert!(
            fault_of(&error).contains("ReadOnly"),
            "away: {away}: {error}"
        );
        let seen = AtomicU64::new(0);
        device
            .launch(1, |context, _| {
                seen.store(context.load(first.at(5))?, Ordering::Relaxed);
                Ok(())
            })
            .unwrap();
        assert_eq!(seen.into_inner(), pattern(1, 5));
        map.check(1);
    }
    // Program text and constants.
    static CONSTANT: [u64; 3] = [11, 12, 13];
    let constant = Pointer::of(CONSTANT.as_ptr());
    let seen = AtomicU64::new(0);
    device
        .launch(1, |context, _| {
            seen.store(context.load(constant.at(1))?, Ordering::Relaxed);
            Ok(())
        })
        .unwrap();
    assert_eq!(seen.into_inner(), 12);
    assert!(
        device
            .launch(1, |context, _| context.store(constant.at(1), 1))
            .is_err()
    );
    assert_eq!(CONSTANT[1], 12);
    hmm.shutdown().unwrap();
}

#[test]
fn a_panic_in_a_kernel_is_an_error_and_nothing_else() {
    let _dog = watchdog("a_panic_in_a_kernel_is_an_error_and_nothing_else", 60);
    let (hmm, device) = engine(8);
    let map = Map::new(64);
    map.fill(2);
    send(&hmm, map.range(), &device);
    for _ in 0..3 {
        let error = device
            .launch(64, |_, index| {
                assert!(index != 17, "seventeen");
                Ok(())
            })
            .unwrap_err();
        match error {
            LaunchError::Panicked { index, message } => {
                assert_eq!(index, 17);
                assert!(message.contains("seventeen"), "{message}");
            }
            other => panic!("{other}"),
        }
    }
    let error = device
        .launch(2, |_, _| Err(KernelError::User(5)))
        .unwrap_err();
    assert!(
        matches!(
            error,
            LaunchError::Kernel {
                error: KernelError::User(5),
                ..
            }
        ),
        "{error}"
    );
    map.check(2);
    let first = Pointer::new(map.word(0));
    device
        .launch(64, |context, page| context.store(first.at(page * WORDS), 3))
        .unwrap();
    assert!((0..64).all(|page| map.get(page * WORDS) == 3));
    drop(map);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

#[test]
fn the_engine_cannot_be_asked_from_a_kernel() {
    let _dog = watchdog("the_engine_cannot_be_asked_from_a_kernel", 60);
    let (hmm, device) = engine(8);
    let map = Map::new(8);
    map.fill(3);
    let range = map.range();
    let (asked, other) = (&hmm, device);
    device
        .launch(1, move |_, _| {
            assert!(matches!(
                asked.migrate(range, other.id()),
                Err(hmm::Error::EngineThread)
            ));
            assert!(matches!(
                other.launch(1, |_, _| Ok(())),
                Err(LaunchError::Nested)
            ));
            Ok(())
        })
        .unwrap();
    map.check(3);
    drop(map);
    hmm.shutdown().unwrap();
}

#[test]
fn failed_allocations_are_reported_and_harmless() {
    let _dog = watchdog("failed_allocations_are_reported_and_harmless", 60);
    let (hmm, device) = engine(32);
    let map = Map::new(2000);
    map.fill(4);
    for count in [1, 3, 1_000_000] {
        device.injector().fail_allocations(count);
        let report = hmm.migrate(map.range(), device.id()).unwrap();
        adds_up(&report, map.range());
        println!("{count} failures: {report}");
        assert!(
            report
                .stayed
                .iter()
                .all(|stay| stay.reason == StayReason::NoDeviceMemory),
            "{report}"
        );
        map.check(4);
        // A kernel works all the same: in place, if need be.
        device.injector().fail_allocations(count);
        let first = Pointer::new(map.word(0));
        device
            .launch(100, |context, page| {
                context.fetch_add(first.at(page * WORDS), 1).map(drop)
            })
            .unwrap();
        for page in 0..100 {
            assert_eq!(
                map.get(page * WORDS),
                pattern(4, page * WORDS).wrapping_add(1)
            );
            map.set(page * WORDS, pattern(4, page * WORDS));
        }
        device.injector().fail_allocations(0);
    }
    send(&hmm, map.range(), &device);
    device.injector().fail_maps(1000);
    let first = Pointer::new(map.word(0));
    let _ = device.launch(10, |context, page| {
        context.load(first.at(page * WORDS)).map(drop)
    });
    device.injector().fail_maps(0);
    map.check(4);
    drop(map);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

#[test]
fn failed_copies_lose_nothing() {
    let _dog = watchdog("failed_copies_lose_nothing", 100);
    for at in [FailAt::Submit, FailAt::Wait] {
        for (after, count) in [(0, 1), (0, 5), (3, 2), (1, 40)] {
            let (hmm, device) = engine(32);
            let map = Map::new(1500);
            map.fill(5);
            device.injector().fail_copies(after, count, at);
            let report = hmm.migrate(map.range(), device.id()).unwrap();
            adds_up(&report, map.range());
            println!("{at:?} after {after}, {count} times: {report}");
            device.injector().fail_copies(0, 0, at);
            let away = on_device(&hmm, map.range(), &device);
            assert_eq!(away, report.moved.plus(report.already).get(), "{report}");
            map.check(5);
            send(&hmm, map.range(), &device);
            // And on the way home, on request.
            device.injector().fail_copies(after, count, at);
            let report = hmm.evict(map.range()).unwrap();
            adds_up(&report, map.range());
            println!("   home: {report}");
            device.injector().fail_copies(0, 0, at);
            map.check(5);
            drop(map);
            all_free(&hmm, &device);
            nothing_staged(&hmm);
            hmm.shutdown().unwrap();
        }
    }
}

#[test]
fn a_cpu_touch_survives_a_few_failed_copies() {
    let _dog = watchdog("a_cpu_touch_survives_a_few_failed_copies", 60);
    let (hmm, device) = engine(32);
    let map = Map::new(100);
    map.fill(6);
    for at in [FailAt::Submit, FailAt::Wait] {
        send(&hmm, map.range(), &device);
        device.injector().fail_copies(0, 1, at);
        map.check(6);
        device.injector().fail_copies(0, 0, at);
    }
    println!("{} copy failures", hmm.statistics().copy_failures);
    drop(map);
    hmm.shutdown().unwrap();
}

#[test]
fn everything_comes_home_from_a_lost_device_that_is_readable() {
    let _dog = watchdog(
        "everything_comes_home_from_a_lost_device_that_is_readable",
        60,
    );
    let (hmm, device) = engine(32);
    let map = Map::new(1500);
    map.fill(7);
    send(&hmm, map.range(), &device);
    device.injector().lose(LossMode::MemoryReadable);
    map.check_part(0, 10, 7);
    assert!(device.launch(1, |_, _| Ok(())).is_err());
    match hmm.migrate(map.range(), device.id()) {
        Ok(report) => {
            adds_up(&report, map.range());
            assert_eq!(report.moved.get(), 0, "{report}");
        }
        Err(error) => println!("{error}"),
    }
    map.check(7);
    // Another one takes over.
    let second = common::device(&hmm, 32);
    send(&hmm, map.range(), &second);
    map.check(7);
    assert!(device.remove().unwrap());
    assert!(matches!(
        hmm.migrate(map.range(), device.id()),
        Err(hmm::Error::NoDevice { .. })
    ));
    drop(map);
    hmm.shutdown().unwrap();
}

#[test]
fn touching_what_was_lost_raises_sigbus() {
    let _dog = watchdog("touching_what_was_lost_raises_sigbus", 60);
    if role().as_deref() == Some("lost") {
        let (hmm, device) = engine(32);
        let (lost, kept) = (Map::new(100), Map::new(100));
        lost.fill(8);
        kept.fill(9);
        send(&hmm, lost.range(), &device);
        device.injector().lose(LossMode::MemoryGone);
        kept.check(9);
        eprintln!("kept is right");
        eprintln!("touched: {}", lost.get(50 * WORDS));
        return;
    }
    let (hmm, _) = engine(1);
    let expected = signal_of_lost_data(&hmm);
    hmm.shutdown().unwrap();
    let (status, text) = run(helper("touching_what_was_lost_raises_sigbus", "lost"), 30);
    println!("{text}");
    let status = status.expect("a touch of lost memory hangs");
    assert!(text.contains("kept is right"));
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, Some(expected), "{status}");
}

#[test]
fn shutdown_after_a_loss_tells_and_ends() {
    let _dog = watchdog("shutdown_after_a_loss_tells_and_ends", 60);
    if role().as_deref() == Some("loss") {
        let (hmm, device) = engine(32);
        let lost = Map::new(100);
        lost.fill(8);
        send(&hmm, lost.range(), &device);
        device.injector().lose(LossMode::MemoryGone);
        match hmm.shutdown() {
            Ok(()) => eprintln!("shutdown says all is well"),
            Err(error) => eprintln!("shutdown: {error}"),
        }
        return;
    }
    let (status, text) = run(helper("shutdown_after_a_loss_tells_and_ends", "loss"), 30);
    println!("{text}");
    assert!(status.expect("shutdown hangs").success());
    assert!(text.contains("shutdown: "), "lost data must be told about");
}

#[test]
fn pages_go_from_device_to_device() {
    let _dog = watchdog("pages_go_from_device_to_device", 60);
    let (hmm, first) = engine(32);
    let second = device(&hmm, 16);
    let map = Map::new(3000);
    map.fill(10);
    for round in 0..3 {
        send(&hmm, map.range(), &first);
        assert_eq!(on_device(&hmm, map.range(), &first), 3000);
        send(&hmm, map.part(500, 2000), &second);
        assert_eq!(on_device(&hmm, map.range(), &second), 2000, "round {round}");
        assert_eq!(on_device(&hmm, map.range(), &first), 1000, "round {round}");
        let word = Pointer::new(map.word(0));
        // Both devices at once on all of it.
        std::thread::scope(|scope| {
            for device in [&first, &second] {
                scope.spawn(|| {
                    device
                        .launch(3000, |context, page| {
                            context.fetch_add(word.at(page * WORDS), 1).map(drop)
                        })
                        .unwrap();
                });
            }
        });
        for page in 0..3000 {
            assert_eq!(
                map.get(page * WORDS),
                pattern(10, page * WORDS).wrapping_add(2)
            );
            map.set(page * WORDS, pattern(10, page * WORDS));
        }
        map.check(10);
    }
    assert!(hmm.statistics().pages_between_devices >= 2000);
    drop(map);
    all_free(&hmm, &first);
    all_free(&hmm, &second);
    hmm.shutdown().unwrap();
}

#[test]
fn a_cpu_touch_revokes_exclusive_pages() {
    let _dog = watchdog("a_cpu_touch_revokes_exclusive_pages", 60);
    let (hmm, device) = engine(8);
    needs_move!(hmm, "no exclusive use");
    let map = Map::new(64);
    map.fill(11);
    let report = hmm.exclusive(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    assert!(report.is_complete(), "{report}");
    let exclusive = PageResidency::Exclusive(device.id());
    assert!(
        hmm.residency(map.range())
            .unwrap()
            .pages()
            .iter()
            .all(|&page| page == exclusive)
    );
    assert_eq!(device.free_memory(), device.memory());
    map.check_part(20, 1, 11);
    assert_eq!(hmm.residency(map.part(20, 1)).unwrap().in_system().get(), 1);
    map.check(11);
    nothing_staged(&hmm);
    drop(map);
    hmm.shutdown().unwrap();
}

#[test]
fn atomics_of_cpus_and_a_device_add_up() {
    let _dog = watchdog("atomics_of_cpus_and_a_device_add_up", 60);
    let (hmm, device) = engine(8);
    let map = Map::new(4);
    let first = Pointer::new(map.word(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for turn in 0..20_000 {
                    // SAFETY: only accessed atomically here.
                    unsafe { AtomicU64::from_ptr(first.at(turn % 4 * WORDS)) }
                        .fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..100 {
                let _ = hmm.exclusive(map.range(), device.id());
            }
        });
        scope.spawn(|| {
            for _ in 0..10 {
                device
                    .launch(100, |context, group| {
                        for turn in 0..20 {
                            context.fetch_add(first.at((group + turn) % 4 * WORDS), 1)?;
                        }
                        Ok(())
                    })
                    .unwrap();
            }
        });
    });
    let sum: u64 = (0..4).map(|page| map.get(page * WORDS)).sum();
    assert_eq!(sum, 2 * 20_000 + 10 * 100 * 20);
    drop(map);
    hmm.shutdown().unwrap();
}

#[test]
fn four_times_the_devices_memory_works() {
    let _dog = watchdog("four_times_the_devices_memory_works", 100);
    let (hmm, device) = engine(4);
    let map = Map::new(4 * 1024);
    map.fill(12);
    let first = Pointer::new(map.word(0));
    for _ in 0..3 {
        device
            .launch(4 * 1024, |context, page| {
                let mut words = [0u64; WORDS];
                context.read_slice(first.at(page * WORDS).cast_const(), &mut words)?;
                for word in &mut words {
                    *word = word.wrapping_mul(3);
                }
                context.write_slice(first.at(page * WORDS), &words)
            })
            .unwrap();
    }
    for index in 0..4 * 1024 * WORDS {
        assert_eq!(
            map.get(index),
            pattern(12, index).wrapping_mul(27),
            "word {index}"
        );
    }
    assert!(hmm.statistics().evicted_pages > 0);
    let report = hmm.migrate(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    assert_eq!(report.stayed_pages.get(), 3 * 1024, "{report}");
    assert!(
        report
            .stayed
            .iter()
            .all(|stay| stay.reason == StayReason::NoDeviceMemory),
        "{report}"
    );
    drop(map);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

#[test]
fn a_request_evicts_what_others_have_there() {
    let _dog = watchdog("a_request_evicts_what_others_have_there", 60);
    let (hmm, device) = engine(4);
    let maps: Vec<Map> = (0..4).map(|_| Map::new(800)).collect();
    for (seed, map) in (1..).zip(&maps) {
        map.fill(seed);
    }
    // Several workers share a request: what one evicts is another one's room.
    for map in maps.iter().cycle().take(40) {
        let report = hmm.migrate(map.range(), device.id()).unwrap();
        assert!(report.is_complete(), "{report}");
    }
    for (seed, map) in (1..).zip(&maps) {
        map.check(seed);
    }
    assert!(hmm.statistics().evicted_pages >= 39 * 800 - 1024);
    drop(maps);
    hmm.shutdown().unwrap();
}

#[test]
fn a_removed_device_leaves_everything_at_home() {
    let _dog = watchdog("a_removed_device_leaves_everything_at_home", 60);
    let (hmm, first) = engine(16);
    let map = Map::new(2000);
    map.fill(13);
    send(&hmm, map.range(), &first);
    assert!(first.remove().unwrap());
    assert_eq!(hmm.residency(map.range()).unwrap().in_system().get(), 2000);
    map.check(13);
    assert!(first.launch(1, |_, _| Ok(())).is_err());
    assert!(first.remove().is_err() || !first.remove().unwrap());
    let second = device(&hmm, 16);
    send(&hmm, map.range(), &second);
    map.check(13);
    drop(map);
    hmm.shutdown().unwrap();
}

/// What is on its way to a device when that is removed does not get lost there.
#[test]
fn a_device_that_is_removed_while_pages_go_there_keeps_none() {
    let _dog = watchdog(
        "a_device_that_is_removed_while_pages_go_there_keeps_none",
        60,
    );
    let hmm = hmm::Hmm::open().unwrap();
    let map = Map::new(16 << 10);
    map.fill(14);
    // An engine has so many devices over its life.
    for round in 0..15 {
        let first = device(&hmm, 64);
        let prefetch = hmm.prefetch(map.range(), first.id()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(round % 5));
        assert!(first.remove().unwrap(), "round {round}");
        let report = prefetch.wait();
        adds_up(&report, map.range());
        map.check(14);
    }
    assert_eq!(hmm.statistics().lost_pages, 0);
    hmm.shutdown().unwrap();
}

#[test]
fn shutdown_brings_everything_home() {
    let _dog = watchdog("shutdown_brings_everything_home", 60);
    let map = Map::new(2000);
    map.fill(14);
    for _ in 0..3 {
        let (hmm, device) = engine(16);
        send(&hmm, map.range(), &device);
        let prefetch = hmm.prefetch(map.range(), device.id()).unwrap();
        drop(prefetch);
        hmm.shutdown().unwrap();
        map.check(14);
    }
    assert_eq!(map.bytes(), 2000 * PAGE);
}

#[test]
fn a_command_reads_in_place_what_was_on_another_device() {
    let hmm = hmm::Hmm::open().unwrap();
    let add = || {
        let options = hmm::SoftwareOptions::new(hmm::ByteCount::mib(8)).workers(1);
        hmm.add_software_device(options).unwrap()
    };
    let (one, other) = (add(), add());
    let memory = vec![7u8; 64 << 12];
    let range = hmm::Memory::whole_pages(&&memory[..]).unwrap().unwrap();
    hmm.migrate(range, other.id()).unwrap();
    let read = std::sync::Mutex::new(Vec::new());
    one.launch(1, |context, _| {
        let mut copy = vec![0u8; range.pages().bytes_usize()];
        let reachable = context.fault_range(range, hmm::Access::Read, hmm::Reach::Present)?;
        assert_eq!(reachable, range.pages());
        assert_eq!(context.read_mapped(range, &mut copy), range.pages());
        *read.lock().unwrap() = copy;
        Ok(())
    })
    .unwrap();
    assert!(read.into_inner().unwrap().iter().all(|&byte| byte == 7));
    assert_eq!(hmm.residency(range).unwrap().on_device(one.id()).get(), 0);
    hmm.shutdown().unwrap();
}
