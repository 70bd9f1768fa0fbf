//! Kernels on a program's own memory, and devices that fail: an error is an
//! error value, data survives what can be survived, and the process lives.
mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use common::either::{program, push};
use common::{
    AnyDevice, Device, Kind, Map, Operation, PAGE, WORDS, Work, add, adds_up, all_free, engine,
    helper, nothing_staged, on_device, open, pattern, role, run, send, signal_of_lost_data,
    watchdog,
};
use hmm::{
    FailAt, KernelError, LaunchError, LossMode, PageResidency, Pointer, ProgramOptions, StayReason,
};

/// Sums the values of a list.
const CHASE: &[u8] = include_bytes!("kernels/chase.spv");
/// Increments them.
const WALK: &[u8] = include_bytes!("kernels/walk_write.spv");

#[repr(C)]
struct Node {
    next: *mut Node,
    value: u64,
    ballast: [u64; 30],
}

/// A kernel that changes nothing.
fn touch(device: &Device, map: &Map) -> Result<(), common::Failure> {
    device.run(Work::new(Operation::Add, map.word(0)))
}

/// Returns the sum of a list's values, and leaves each one greater by one.
fn walk(device: &Device, head: *mut Node) -> u64 {
    match device {
        Device::Software(device) => {
            let (start, sum) = (Pointer::new(head), AtomicU64::new(0));
            let walked = device.launch(1, |context, _| {
                let mut at = start.get();
                while !at.is_null() {
                    let word = at.wrapping_byte_add(std::mem::offset_of!(Node, value));
                    let value = context.load(word.cast::<u64>())?;
                    sum.fetch_add(value, Ordering::Relaxed);
                    context.store(word.cast::<u64>(), value + 1)?;
                    at = context.load(at.cast::<*mut Node>())?;
                }
                Ok(())
            });
            walked.unwrap();
            sum.into_inner()
        }
        Device::Vulkan(_, device, _) => {
            let words = Map::new(1);
            words.set(0, head.expose_provenance() as u64);
            let (heads, sum) = (words.word(0).addr() as u64, words.word(1).addr() as u64);
            let [chase, walk] = [CHASE, WALK].map(|shader| {
                // Both walk into pages that are not there; one has written by then.
                program(device, shader, ProgramOptions::default())
            });
            let launched = device.launch(&chase, [1, 1, 1], &push(&chase, &[heads, sum, 1]));
            println!("{:?}: {:?}", chase.on_demand(), launched.unwrap());
            let launched = device.launch(&walk, [1, 1, 1], &push(&walk, &[heads, 1]));
            println!("{:?}: {:?}", walk.on_demand(), launched.unwrap());
            words.get(1)
        }
    }
}

on_each!(a_kernel_walks_and_changes_a_linked_list: software, vulkan);
fn a_kernel_walks_and_changes_a_linked_list(kind: Kind) {
    let _dog = watchdog("a_kernel_walks_and_changes_a_linked_list", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    let mut head: *mut Node = std::ptr::null_mut();
    for value in 0..20_000u64 {
        head = Box::into_raw(Box::new(Node {
            value,
            next: head,
            ballast: [value; 30],
        }));
    }
    assert_eq!(walk(&device, head), 20_000 * 19_999 / 2);
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

on_each!(bad_pointers_in_a_kernel_are_errors: software, vulkan, waiting, named);
fn bad_pointers_in_a_kernel_are_errors(kind: Kind) {
    let _dog = watchdog("bad_pointers_in_a_kernel_are_errors", 60);
    let (hmm, device) = or_skip!(open(kind, 8));
    let none = Map::with(1, libc::PROT_NONE, libc::MAP_PRIVATE, -1);
    let (map, seen) = (Map::new(200), Map::new(1));
    map.fill(1);
    send(&hmm, map.range(), &device);
    let bad: [(&str, usize); 7] = [
        ("null", 0),
        ("near null", 8),
        ("unmapped", 0x1000_0000),
        ("the end of user space", (1 << 47) - 8),
        ("kernel", 0xffff_ffff_8000_0000),
        ("the last word", usize::MAX - 7),
        ("PROT_NONE", none.at() as usize),
    ];
    for (what, address) in bad {
        let at = std::ptr::with_exposed_provenance_mut::<u64>(address);
        for operation in [Operation::Load, Operation::Store, Operation::Add] {
            let error = device
                .run(Work::new(operation, at).other(seen.word(0)))
                .expect_err(what);
            println!("{what}: {error}");
            let write = operation != Operation::Load;
            assert!(
                error.is("NotMapped") || (write && error.is("ReadOnly")),
                "{what}: {}",
                error.parts
            );
            assert!(error.names(at), "{what} at {at:?}: {error}");
        }
    }
    // And the device still works; nothing was lost.
    device
        .run(Work::new(Operation::Add, map.word(0)).pages(200).value(7))
        .unwrap();
    for page in 0..200 {
        let index = page * WORDS;
        assert_eq!(map.get(index), pattern(1, index).wrapping_add(7));
        map.set(index, pattern(1, index));
    }
    map.check(1);
    drop((map, seen));
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

/// What the software device's kernels are told besides.
#[test]
fn accesses_that_make_no_sense_are_errors() {
    let _dog = watchdog("accesses_that_make_no_sense_are_errors", 60);
    let (hmm, device) = engine(8);
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
    let map = Map::new(4);
    let first = Pointer::new(map.word(0));
    device
        .launch(4, |context, page| context.store(first.at(page * WORDS), 7))
        .unwrap();
    assert!((0..4).all(|page| map.get(page * WORDS) == 7));
    drop(map);
    hmm.shutdown().unwrap();
}

on_each!(writes_to_read_only_memory_are_refused: software, vulkan, waiting, named);
fn writes_to_read_only_memory_are_refused(kind: Kind) {
    let _dog = watchdog("writes_to_read_only_memory_are_refused", 60);
    let (hmm, device) = or_skip!(open(kind, 8));
    let seen = Map::new(1);
    // Once with pages at home, once on the device before they are protected.
    for away in [false, true] {
        let map = Map::new(8);
        map.fill(1);
        if away {
            send(&hmm, map.range(), &device);
        }
        map.protect(0, 8, libc::PROT_READ);
        for operation in [Operation::Store, Operation::Add, Operation::Multiply] {
            let error = device
                .run(Work::new(operation, map.word(5)).value(99))
                .expect_err("a write to read-only memory");
            // What is named is named by the page.
            let named = map.word(if kind == Kind::Named { 0 } else { 5 });
            assert!(
                error.is("ReadOnly") && error.names(named),
                "away: {away}: {error}"
            );
        }
        device
            .run(Work::new(Operation::Load, map.word(5)).other(seen.word(0)))
            .unwrap();
        assert_eq!(seen.get(0), pattern(1, 5));
        map.check(1);
    }
    // Program text and constants.
    static CONSTANT: [u64; 3] = [11, 12, 13];
    let constant = CONSTANT.as_ptr().wrapping_add(1).cast_mut();
    let read = device.run(Work::new(Operation::Load, constant).other(seen.word(0)));
    if kind.works_in_place() {
        read.unwrap();
        assert_eq!(seen.get(0), 12);
    } else {
        let error = read.expect_err("a file's page, which cannot move");
        assert!(
            error.is("Unreachable { address") && error.is("FileBacked"),
            "{error}"
        );
    }
    let error = device.run(Work::new(Operation::Store, constant).value(1));
    assert!(error.unwrap_err().is("ReadOnly"));
    assert_eq!(CONSTANT[1], 12);
    drop(seen);
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

on_each!(failed_allocations_are_reported_and_harmless: software, vulkan, waiting, named);
fn failed_allocations_are_reported_and_harmless(kind: Kind) {
    const SOME: usize = 100;
    let _dog = watchdog("failed_allocations_are_reported_and_harmless", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
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
        // A kernel works all the same, in place if need be; where it cannot it says so.
        device.injector().fail_allocations(count);
        let done = device.run(Work::new(Operation::Add, map.word(0)).pages(SOME).value(1));
        match &done {
            Ok(()) => {}
            Err(error) => {
                println!("{count} failures: {error}");
                assert!(!kind.works_in_place(), "{error}");
                assert!(
                    error.is("Unreachable") && error.is("NoDeviceMemory"),
                    "{error}"
                );
            }
        }
        for page in 0..SOME {
            let index = page * WORDS;
            let added = map.get(index).wrapping_sub(pattern(4, index));
            // Not all have come so far when one fails.
            assert!(added == 1 || (added == 0 && done.is_err()), "page {page}");
            map.set(index, pattern(4, index));
        }
        device.injector().fail_allocations(0);
    }
    send(&hmm, map.range(), &device);
    device.injector().fail_maps(1000);
    let seen = Map::new(1);
    let _ = device.run(
        Work::new(Operation::Load, map.word(0))
            .pages(10)
            .other(seen.word(0)),
    );
    device.injector().fail_maps(0);
    map.check(4);
    drop((map, seen));
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

on_each!(failed_copies_lose_nothing: software, vulkan);
fn failed_copies_lose_nothing(kind: Kind) {
    let _dog = watchdog("failed_copies_lose_nothing", 100);
    for at in [FailAt::Submit, FailAt::Wait] {
        for (after, count) in [(0, 1), (0, 5), (3, 2), (1, 40)] {
            let (hmm, device) = or_skip!(open(kind, 32));
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

on_each!(a_cpu_touch_survives_a_few_failed_copies: software, vulkan);
fn a_cpu_touch_survives_a_few_failed_copies(kind: Kind) {
    let _dog = watchdog("a_cpu_touch_survives_a_few_failed_copies", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
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

on_each!(everything_comes_home_from_a_lost_device_that_is_readable: software, vulkan);
fn everything_comes_home_from_a_lost_device_that_is_readable(kind: Kind) {
    let _dog = watchdog(
        "everything_comes_home_from_a_lost_device_that_is_readable",
        60,
    );
    let (hmm, device) = or_skip!(open(kind, 32));
    let map = Map::new(1500);
    map.fill(7);
    send(&hmm, map.range(), &device);
    device.injector().lose(LossMode::MemoryReadable);
    map.check_part(0, 10, 7);
    assert!(touch(&device, &map).is_err_and(|error| error.lost));
    match hmm.migrate(map.range(), device.id()) {
        Ok(report) => {
            adds_up(&report, map.range());
            assert_eq!(report.moved.get(), 0, "{report}");
        }
        Err(error) => println!("{error}"),
    }
    map.check(7);
    // Another one takes over.
    let second = or_skip!(add(&hmm, kind, 32));
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

on_each!(touching_what_was_lost_raises_sigbus: software, vulkan);
fn touching_what_was_lost_raises_sigbus(kind: Kind) {
    let _dog = watchdog("touching_what_was_lost_raises_sigbus", 60);
    if role().as_deref() == Some("lost") {
        let (hmm, device) = or_skip!(open(kind, 32));
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
    let (hmm, _) = or_skip!(open(kind, 1));
    let expected = signal_of_lost_data(&hmm);
    hmm.shutdown().unwrap();
    let (status, text) = run(
        helper(&kind.test("touching_what_was_lost_raises_sigbus"), "lost"),
        30,
    );
    println!("{text}");
    let status = status.expect("a touch of lost memory hangs");
    assert!(text.contains("kept is right"));
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, Some(expected), "{status}");
}

on_each!(shutdown_after_a_loss_tells_and_ends: software, vulkan);
fn shutdown_after_a_loss_tells_and_ends(kind: Kind) {
    let _dog = watchdog("shutdown_after_a_loss_tells_and_ends", 60);
    if role().as_deref() == Some("loss") {
        let (hmm, device) = or_skip!(open(kind, 32));
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
    let (status, text) = run(
        helper(&kind.test("shutdown_after_a_loss_tells_and_ends"), "loss"),
        30,
    );
    println!("{text}");
    if let Some(reason) = text.lines().find(|line| line.contains("SKIPPED")) {
        skip!("{reason}");
    }
    assert!(status.expect("shutdown hangs").success());
    assert!(text.contains("shutdown: "), "lost data must be told about");
}

/// What works beside a device of this kind.
fn another(kind: Kind) -> Kind {
    match kind {
        Kind::Software | Kind::Vulkan => Kind::Software,
        Kind::Waiting => Kind::Vulkan,
        Kind::Named => Kind::Waiting,
    }
}

on_each!(pages_go_from_device_to_device: software, vulkan, waiting, named);
fn pages_go_from_device_to_device(kind: Kind) {
    let _dog = watchdog("pages_go_from_device_to_device", 60);
    let (hmm, first) = or_skip!(open(kind, 32));
    let second = or_skip!(add(&hmm, another(kind), 16));
    let map = Map::new(3000);
    map.fill(10);
    for round in 0..3 {
        send(&hmm, map.range(), &first);
        assert_eq!(on_device(&hmm, map.range(), &first), 3000);
        send(&hmm, map.part(500, 2000), &second);
        assert_eq!(on_device(&hmm, map.range(), &second), 2000, "round {round}");
        assert_eq!(on_device(&hmm, map.range(), &first), 1000, "round {round}");
        let work = Work::new(Operation::Add, map.word(0)).pages(3000).value(1);
        // Both devices at once on all of it.
        std::thread::scope(|scope| {
            for device in [&first, &second] {
                scope.spawn(move || device.run(work).unwrap());
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

on_each!(atomics_of_cpus_and_a_device_add_up: software, vulkan, waiting);
fn atomics_of_cpus_and_a_device_add_up(kind: Kind) {
    let _dog = watchdog("atomics_of_cpus_and_a_device_add_up", 60);
    let (hmm, device) = or_skip!(open(kind, 8));
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
            let work = Work::new(Operation::Add, map.word(0)).pages(4).value(1);
            for _ in 0..10 {
                device.run(work.times(500)).unwrap();
            }
        });
    });
    let sum: u64 = (0..4).map(|page| map.get(page * WORDS)).sum();
    assert_eq!(sum, 2 * 20_000 + 10 * 4 * 500);
    drop(map);
    hmm.shutdown().unwrap();
}

on_each!(four_times_the_devices_memory_works: software, vulkan, waiting);
fn four_times_the_devices_memory_works(kind: Kind) {
    let _dog = watchdog("four_times_the_devices_memory_works", 100);
    let (hmm, device) = or_skip!(open(kind, 4));
    let map = Map::new(4 * 1024);
    map.fill(12);
    let all = Work::new(Operation::Multiply, map.word(0)).count(4 * 1024 * WORDS);
    for _ in 0..3 {
        device.run(all.value(3)).unwrap();
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

on_each!(a_request_evicts_what_others_have_there: software, vulkan);
fn a_request_evicts_what_others_have_there(kind: Kind) {
    let _dog = watchdog("a_request_evicts_what_others_have_there", 60);
    let (hmm, device) = or_skip!(open(kind, 4));
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

on_each!(a_removed_device_leaves_everything_at_home: software, vulkan);
fn a_removed_device_leaves_everything_at_home(kind: Kind) {
    let _dog = watchdog("a_removed_device_leaves_everything_at_home", 60);
    let (hmm, first) = or_skip!(open(kind, 16));
    let map = Map::new(2000);
    map.fill(13);
    send(&hmm, map.range(), &first);
    assert!(first.remove().unwrap());
    assert_eq!(hmm.residency(map.range()).unwrap().in_system().get(), 2000);
    map.check(13);
    assert!(touch(&first, &map).is_err_and(|error| error.lost));
    assert!(first.remove().is_err() || !first.remove().unwrap());
    let second = or_skip!(add(&hmm, kind, 16));
    send(&hmm, map.range(), &second);
    map.check(13);
    drop(map);
    hmm.shutdown().unwrap();
}

on_each!(a_device_that_is_removed_while_pages_go_there_keeps_none: software, vulkan);
/// What is on its way to a device when that is removed does not get lost there.
fn a_device_that_is_removed_while_pages_go_there_keeps_none(kind: Kind) {
    let _dog = watchdog(
        "a_device_that_is_removed_while_pages_go_there_keeps_none",
        60,
    );
    let hmm = hmm::Hmm::open().unwrap();
    let map = Map::new(16 << 10);
    map.fill(14);
    // An engine has so many devices over its life.
    for round in 0..15 {
        let first = or_skip!(add(&hmm, kind, 64));
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

on_each!(shutdown_brings_everything_home: software, vulkan);
fn shutdown_brings_everything_home(kind: Kind) {
    let _dog = watchdog("shutdown_brings_everything_home", 60);
    let map = Map::new(2000);
    map.fill(14);
    for _ in 0..3 {
        let (hmm, device) = or_skip!(open(kind, 16));
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
