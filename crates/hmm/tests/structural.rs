//! munmap, mremap, madvise and fork of memory that is on a device, half there,
//! or mixed: what the program sees is what it would see without an engine.

#![allow(
    clippy::needless_range_loop,
    reason = "the index names the mix in messages too"
)]
mod common;

use std::process::Command;
use std::sync::Barrier;

use common::{
    AnyDevice, Device, HUGE, Kind, Map, Operation, PAGE, Rng, WORDS, Work, all_free, fetch, fork,
    nothing_staged, on_device, open, pattern, send, wait, watchdog,
};
use hmm::{PageRange, StayReason, VirtAddr};

const PAGES: usize = 1500;

/// Ways to have a mapping's pages before something happens to it.
const MIXES: [&str; 4] = [
    "home",
    "all away",
    "second half away",
    "every third page away",
];

fn mix(hmm: &hmm::Hmm, device: &Device, map: &Map, how: usize) {
    match how {
        0 => {}
        1 => drop(send(hmm, map.range(), device)),
        2 => drop(send(
            hmm,
            map.part(map.pages() / 2, map.pages() / 2),
            device,
        )),
        _ => {
            for page in (0..map.pages()).step_by(3) {
                send(hmm, map.part(page, 1), device);
            }
        }
    }
}

fn end(hmm: hmm::Hmm, device: &Device) {
    all_free(&hmm, device);
    nothing_staged(&hmm);
    hmm.shutdown().expect("a clean end");
}

on_each!(munmap_of_device_pages_frees_their_frames: software, vulkan);
fn munmap_of_device_pages_frees_their_frames(kind: Kind) {
    let _dog = watchdog("munmap_of_device_pages_frees_their_frames", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(1);
        mix(&hmm, &device, &map, how);
        drop(map);
        // Its event was read before munmap returned; applied soon after.
        all_free(&hmm, &device);
    }
    end(hmm, &device);
}

on_each!(partial_munmap_leaves_the_neighbours_alone: software, vulkan);
fn partial_munmap_leaves_the_neighbours_alone(kind: Kind) {
    let _dog = watchdog("partial_munmap_leaves_the_neighbours_alone", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(2);
        mix(&hmm, &device, &map, how);
        map.unmap_part(500, 300);
        let hole = map.part(500, 300);
        assert!(matches!(
            hmm.migrate(hole, device.id()),
            Err(hmm::Error::NotMapped { .. })
        ));
        assert_eq!(on_device(&hmm, hole, &device), 0);
        map.check_part(0, 500, 2);
        map.check_part(800, PAGES - 800, 2);
        // All of it again, with the hole in it.
        let report = hmm.migrate(map.range(), device.id()).unwrap();
        common::adds_up(&report, map.range());
        let holes: u64 = report
            .stayed
            .iter()
            .filter(|stay| stay.reason == StayReason::NotMapped)
            .map(|stay| stay.range.pages().get())
            .sum();
        assert_eq!(holes, 300, "{}: {report}", MIXES[how]);
        map.check_part(0, 500, 2);
        map.check_part(800, PAGES - 800, 2);
    }
    end(hmm, &device);
}

on_each!(what_is_mapped_anew_at_the_same_place_is_zero: software, vulkan);
fn what_is_mapped_anew_at_the_same_place_is_zero(kind: Kind) {
    let _dog = watchdog("what_is_mapped_anew_at_the_same_place_is_zero", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(3);
        mix(&hmm, &device, &map, how);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // First over the old one, then into a hole.
        for unmap_first in [false, true] {
            if unmap_first {
                map.unmap_part(100, 900);
            }
            // SAFETY: over this test's own mapping.
            let got = unsafe {
                libc::mmap(
                    map.page(100).cast(),
                    900 * PAGE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    flags,
                    -1,
                    0,
                )
            };
            assert_eq!(got, map.page(100).cast());
            map.check_part(0, 100, 3);
            map.check_zero(100, 900);
            map.check_part(1000, PAGES - 1000, 3);
            map.fill_part(100, 900, 4);
            send(&hmm, map.range(), &device);
            map.check_part(0, 100, 3);
            map.check_part(100, 900, 4);
            map.check_part(1000, PAGES - 1000, 3);
            send(&hmm, map.range(), &device);
        }
    }
    end(hmm, &device);
}

on_each!(mremap_moves_the_content_wherever_it_is: software, vulkan);
fn mremap_moves_the_content_wherever_it_is(kind: Kind) {
    let _dog = watchdog("mremap_moves_the_content_wherever_it_is", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(5);
        mix(&hmm, &device, &map, how);
        let before = on_device(&hmm, map.range(), &device);
        // The block after it in address space is taken, so it must move.
        let target = Map::with(PAGES + 7, libc::PROT_NONE, libc::MAP_PRIVATE, -1);
        let at = target.page(7);
        let map = map.remap(PAGES, libc::MREMAP_MAYMOVE, Some(at));
        assert_eq!(map.at(), at);
        assert_eq!(
            on_device(&hmm, map.range(), &device),
            before,
            "{}",
            MIXES[how]
        );
        map.check(5);
        send(&hmm, map.range(), &device);
        map.check(5);
        // The front of `target` is still its own.
        let front = target.at();
        target.leak();
        drop(Map::adopt(front, 7));
    }
    end(hmm, &device);
}

on_each!(mremap_grows_with_zeros_and_shrinks: software, vulkan);
fn mremap_grows_with_zeros_and_shrinks(kind: Kind) {
    let _dog = watchdog("mremap_grows_with_zeros_and_shrinks", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(6);
        mix(&hmm, &device, &map, how);
        let map = map.remap(2 * PAGES, libc::MREMAP_MAYMOVE, None);
        map.check_zero(PAGES, PAGES);
        map.check_part(0, PAGES, 6);
        map.fill(7);
        send(&hmm, map.range(), &device);
        let map = map.remap(3 * PAGES, libc::MREMAP_MAYMOVE, None);
        // The tail untouched so far: it goes as zeros.
        send(&hmm, map.part(2 * PAGES, PAGES), &device);
        map.check_zero(2 * PAGES, PAGES);
        map.check_part(0, 2 * PAGES, 7);
        send(&hmm, map.range(), &device);
        let map = map.remap(PAGES / 2, 0, None);
        map.check(7);
        send(&hmm, map.range(), &device);
        assert_eq!(
            (device.memory().get() - device.free_memory().get()) / PAGE as u64,
            PAGES as u64 / 2,
            "the tail's frames are free"
        );
    }
    end(hmm, &device);
}

on_each!(mremap_dontunmap_leaves_zeros_behind: software, vulkan);
fn mremap_dontunmap_leaves_zeros_behind(kind: Kind) {
    let _dog = watchdog("mremap_dontunmap_leaves_zeros_behind", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(8);
        mix(&hmm, &device, &map, how);
        let old = Map::adopt(map.at(), PAGES);
        let new = map.remap(PAGES, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, None);
        assert_ne!(old.at(), new.at());
        old.check_zero(0, PAGES);
        new.check(8);
        old.fill(9);
        send(&hmm, old.range(), &device);
        send(&hmm, new.range(), &device);
        old.check(9);
        new.check(8);
    }
    end(hmm, &device);
}

on_each!(madvise_dontneed_reads_as_zeros: software, vulkan);
fn madvise_dontneed_reads_as_zeros(kind: Kind) {
    let _dog = watchdog("madvise_dontneed_reads_as_zeros", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(10);
        mix(&hmm, &device, &map, how);
        assert!(map.advise(200, 1000, libc::MADV_DONTNEED));
        map.check_zero(200, 1000);
        map.check_part(0, 200, 10);
        map.check_part(1200, PAGES - 1200, 10);
        map.fill_part(200, 1000, 11);
        send(&hmm, map.range(), &device);
        map.check_part(200, 1000, 11);
        map.check_part(0, 200, 10);
        map.check_part(1200, PAGES - 1200, 10);
    }
    end(hmm, &device);
}

on_each!(a_device_reads_zeros_after_madvise_dontneed: software, vulkan, waiting, named);
fn a_device_reads_zeros_after_madvise_dontneed(kind: Kind) {
    let _dog = watchdog("a_device_reads_zeros_after_madvise_dontneed", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    for how in 0..MIXES.len() {
        let map = Map::new(256);
        map.fill(12);
        mix(&hmm, &device, &map, how);
        assert!(map.advise(0, 256, libc::MADV_DONTNEED));
        let seen = Map::new(1);
        seen.fill(1);
        let first = map.word(0);
        device
            .run(
                Work::new(Operation::Load, first)
                    .pages(256)
                    .other(seen.word(0)),
            )
            .unwrap();
        assert!((0..256).all(|page| seen.get(page) == 0), "{}", MIXES[how]);
        device
            .run(Work::new(Operation::Store, first).pages(256))
            .unwrap();
        assert!((0..256).all(|page| map.get(page * WORDS) == page as u64));
    }
    end(hmm, &device);
}

on_each!(madvise_free_reads_as_data_or_zeros: software, vulkan);
fn madvise_free_reads_as_data_or_zeros(kind: Kind) {
    let _dog = watchdog("madvise_free_reads_as_data_or_zeros", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(13);
        mix(&hmm, &device, &map, how);
        assert!(map.advise(0, PAGES, libc::MADV_FREE));
        for page in 0..PAGES {
            let value = map.get(page * WORDS);
            assert!(
                value == 0 || value == pattern(13, page * WORDS),
                "page {page}: {value:#x}"
            );
        }
        // Written pages keep what is written.
        map.fill(14);
        map.check(14);
        // The kernel announces MADV_FREE like MADV_DONTNEED, and never says that
        // a page was written after all: such pages stay (docs/limits.md).
        let report = hmm.migrate(map.range(), device.id()).unwrap();
        common::adds_up(&report, map.range());
        assert!(
            report
                .stayed
                .iter()
                .all(|stay| stay.reason == hmm::StayReason::Discarded),
            "{report}"
        );
        map.check(14);
    }
    end(hmm, &device);
}

on_each!(mprotect_of_device_pages_is_obeyed: software, vulkan);
fn mprotect_of_device_pages_is_obeyed(kind: Kind) {
    let _dog = watchdog("mprotect_of_device_pages_is_obeyed", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    let map = Map::new(64);
    map.fill(15);
    send(&hmm, map.range(), &device);
    map.protect(0, 64, libc::PROT_READ);
    map.check(15);
    map.protect(0, 64, libc::PROT_READ | libc::PROT_WRITE);
    send(&hmm, map.range(), &device);
    map.protect(0, 64, libc::PROT_NONE);
    map.protect(0, 64, libc::PROT_READ | libc::PROT_WRITE);
    map.check(15);
    drop(map);
    end(hmm, &device);
}

on_each!(eviction_of_protected_pages_brings_them_home: software, vulkan);
fn eviction_of_protected_pages_brings_them_home(kind: Kind) {
    let _dog = watchdog("eviction_of_protected_pages_brings_them_home", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    for protection in [libc::PROT_READ, libc::PROT_NONE] {
        let map = Map::new(64);
        map.fill(16);
        send(&hmm, map.range(), &device);
        map.protect(0, 64, protection);
        let report = fetch(&hmm, map.range());
        println!("protection {protection}: {report}");
        map.protect(0, 64, libc::PROT_READ | libc::PROT_WRITE);
        map.check(16);
    }
    end(hmm, &device);
}

on_each!(a_child_reads_what_was_there_at_the_fork: software, vulkan, waiting, named);
fn a_child_reads_what_was_there_at_the_fork(kind: Kind) {
    let _dog = watchdog("a_child_reads_what_was_there_at_the_fork", 100);
    let (hmm, device) = or_skip!(open(kind, 32));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(20);
        mix(&hmm, &device, &map, how);
        let go = Map::with(1, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, -1);
        let child = fork(|| {
            while go.get(0) == 0 {
                std::hint::spin_loop();
            }
            i32::from(map.wrong(0, PAGES, 20).is_some())
        });
        // The parent changes, evicts and sends them again meanwhile.
        map.fill_part(0, 100, 21);
        fetch(&hmm, map.part(100, 600));
        map.fill_part(100, 1000, 21);
        let all = Work::new(Operation::Fill, map.word(0)).count(PAGES * WORDS);
        device.run(all.value(22)).unwrap();
        go.set(0, 1);
        assert_eq!(
            wait(child),
            0,
            "{}: the child reads something else",
            MIXES[how]
        );
        map.check(22);
    }
    end(hmm, &device);
}

on_each!(a_child_without_haste_is_served_to_the_end: software, vulkan);
fn a_child_without_haste_is_served_to_the_end(kind: Kind) {
    let _dog = watchdog("a_child_without_haste_is_served_to_the_end", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    let map = Map::new(PAGES);
    map.fill(23);
    send(&hmm, map.range(), &device);
    let child = fork(|| {
        // SAFETY: sleeps.
        unsafe { libc::usleep(1_500_000) };
        i32::from(map.wrong(0, PAGES, 23).is_some())
    });
    drop(map);
    all_free(&hmm, &device);
    assert_eq!(wait(child), 0);
    println!("{} pages given to children", hmm.statistics().child_pages);
    end(hmm, &device);
}

on_each!(writes_after_a_fork_stay_on_their_side: software, vulkan);
fn writes_after_a_fork_stay_on_their_side(kind: Kind) {
    let _dog = watchdog("writes_after_a_fork_stay_on_their_side", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    for how in 0..MIXES.len() {
        let map = Map::new(PAGES);
        map.fill(24);
        mix(&hmm, &device, &map, how);
        let child = fork(|| {
            map.fill_part(0, PAGES / 2, 25);
            let wrong = map
                .wrong(0, PAGES / 2, 25)
                .or(map.wrong(PAGES / 2, PAGES / 2, 24));
            i32::from(wrong.is_some())
        });
        assert_eq!(wait(child), 0, "{}", MIXES[how]);
        map.check(24);
        send(&hmm, map.range(), &device);
        map.check(24);
    }
    end(hmm, &device);
}

on_each!(exclusive_pages_are_right_in_a_child: software, vulkan, waiting, named);
fn exclusive_pages_are_right_in_a_child(kind: Kind) {
    let _dog = watchdog("exclusive_pages_are_right_in_a_child", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    let map = Map::new(300);
    map.fill(26);
    match hmm.exclusive(map.range(), device.id()) {
        Ok(report) => common::adds_up(&report, map.range()),
        // Then its own memory has to do.
        Err(hmm::Error::NotInPlace { .. }) => drop(send(&hmm, map.range(), &device)),
        Err(error) => panic!("{error}"),
    }
    let child = fork(|| i32::from(map.wrong(0, 300, 26).is_some()));
    device
        .run(Work::new(Operation::Store, map.word(0)).value(1))
        .unwrap();
    assert_eq!(wait(child), 0);
    assert_eq!(map.get(0), 1);
    map.check_part(1, 299, 26);
    drop(map);
    end(hmm, &device);
}

on_each!(a_chain_of_forks_reads_right_data: software, vulkan);
fn a_chain_of_forks_reads_right_data(kind: Kind) {
    let _dog = watchdog("a_chain_of_forks_reads_right_data", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    let map = Map::new(PAGES);
    map.fill(27);
    send(&hmm, map.range(), &device);
    fn generation(map: &Map, left: usize) -> i32 {
        // Each writes a page of its own and finds those of its ancestors.
        map.fill_part(left, 1, 28);
        if left > 0 {
            let status = wait(fork(|| generation(map, left - 1)));
            if status != 0 {
                return status;
            }
        }
        let wrong = map
            .wrong(left, 6 - left, 28)
            .or(map.wrong(0, left, 27))
            .or(map.wrong(6, PAGES - 6, 27));
        if wrong.is_some() {
            10 + i32::try_from(left).unwrap_or(0)
        } else {
            0
        }
    }
    assert_eq!(wait(fork(|| generation(&map, 5))), 0);
    map.check(27);
    drop(map);
    end(hmm, &device);
}

on_each!(a_child_may_unmap_and_remap_what_it_is_owed: software, vulkan);
fn a_child_may_unmap_and_remap_what_it_is_owed(kind: Kind) {
    let _dog = watchdog("a_child_may_unmap_and_remap_what_it_is_owed", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    let map = Map::new(PAGES);
    map.fill(29);
    send(&hmm, map.range(), &device);
    let child = fork(|| {
        let map = Map::adopt(map.at(), PAGES);
        if !map.advise(100, 100, libc::MADV_DONTNEED) {
            return 2;
        }
        map.unmap_part(1400, 100);
        let old = map.at();
        let map =
            Map::adopt(old, 1400).remap(1400, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, None);
        if map.not_zero(100, 100).is_some() {
            return 3;
        }
        if map.wrong(0, 100, 29).or(map.wrong(200, 1200, 29)).is_some() {
            return 4;
        }
        let old = Map::adopt(old, 1400);
        if old.not_zero(0, 1400).is_some() {
            return 5;
        }
        0
    });
    assert_eq!(wait(child), 0);
    map.check(29);
    drop(map);
    end(hmm, &device);
}

on_each!(a_child_does_not_see_what_it_may_not_see: software, vulkan);
fn a_child_does_not_see_what_it_may_not_see(kind: Kind) {
    let _dog = watchdog("a_child_does_not_see_what_it_may_not_see", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    let map = Map::new(300);
    map.fill(30);
    assert!(map.advise(0, 100, libc::MADV_WIPEONFORK));
    assert!(map.advise(200, 100, libc::MADV_DONTFORK));
    send(&hmm, map.range(), &device);
    let child = fork(|| {
        if map.not_zero(0, 100).is_some() {
            return 1;
        }
        if map.wrong(100, 100, 30).is_some() {
            return 2;
        }
        let mut there = 0u8;
        // SAFETY: mincore says ENOMEM for what is not mapped.
        let mapped = unsafe { libc::mincore(map.page(200).cast(), PAGE, &raw mut there) } == 0;
        if mapped { 3 } else { 0 }
    });
    assert_eq!(wait(child), 0);
    map.check(30);
    drop(map);
    end(hmm, &device);
}

on_each!(many_children_at_once_are_served: software, vulkan);
fn many_children_at_once_are_served(kind: Kind) {
    let _dog = watchdog("many_children_at_once_are_served", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    let map = Map::new(200);
    map.fill(31);
    send(&hmm, map.range(), &device);
    let children: Vec<i32> = (0..20)
        .map(|number| {
            let child = fork(|| i32::from(map.wrong(0, 200, 31).is_some()));
            map.fill_part(number, 1, 31);
            child
        })
        .collect();
    for child in children {
        assert_eq!(wait(child), 0);
    }
    map.check(31);
    drop(map);
    end(hmm, &device);
}

on_each!(children_that_look_about_find_all_of_it: software, vulkan);
/// Many of these faults are served when the child has the page already: with
/// another one, or in the background.
fn children_that_look_about_find_all_of_it(kind: Kind) {
    let _dog = watchdog("children_that_look_about_find_all_of_it", 60);
    let (hmm, device) = or_skip!(open(kind, 8));
    let maps = [false, true].map(|huge| Map::aligned(2 * HUGE, huge));
    maps.iter().for_each(|map| map.fill(33));
    for round in 0..40 {
        let map = &maps[(round % 2) as usize];
        send(&hmm, map.range(), &device);
        let children: Vec<_> = (0..2)
            .map(|number| {
                fork(|| {
                    let mut rng = Rng::new(2 * round + number);
                    let wrong = |page| map.wrong(page, 1, 33).is_some();
                    let any = (0..400).any(|_| wrong(rng.below(map.pages())));
                    i32::from(any) + 2 * i32::from(map.wrong(0, map.pages(), 33).is_some())
                })
            })
            .collect();
        for child in children {
            assert_eq!(
                wait(child),
                0,
                "a child of round {round} found something else"
            );
        }
    }
    maps.iter().for_each(|map| map.check(33));
    drop(maps);
    end(hmm, &device);
}

on_each!(children_that_are_killed_leave_nothing_behind: software, vulkan);
fn children_that_are_killed_leave_nothing_behind(kind: Kind) {
    let _dog = watchdog("children_that_are_killed_leave_nothing_behind", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    let map = Map::new(PAGES);
    map.fill(32);
    for _ in 0..10 {
        send(&hmm, map.range(), &device);
        let child = fork(|| {
            loop {
                map.fill(33);
            }
        });
        // SAFETY: this test's child.
        unsafe { libc::kill(child, libc::SIGKILL) };
        assert_eq!(wait(child), -libc::SIGKILL);
    }
    map.check(32);
    drop(map);
    end(hmm, &device);
}

on_each!(commands_start_while_pages_are_away: software, vulkan);
fn commands_start_while_pages_are_away(kind: Kind) {
    let _dog = watchdog("commands_start_while_pages_are_away", 60);
    let (hmm, device) = or_skip!(open(kind, 32));
    let mut data: Vec<u64> = (0..200_000).collect();
    for _ in 0..10 {
        hmm.migrate(&mut data[..], device.id()).unwrap();
        let output = Command::new("/bin/echo").arg("hello").output().unwrap();
        assert_eq!(output.stdout, b"hello\n");
    }
    assert!(data.iter().copied().eq(0..200_000));
    // A command whose program is not there: the error comes through.
    hmm.migrate(&mut data[..], device.id()).unwrap();
    assert!(Command::new("/no/such/program").output().is_err());
    // With something to run in the child, it is a real fork.
    hmm.migrate(&mut data[..], device.id()).unwrap();
    let mut command = Command::new("/bin/true");
    // SAFETY: does nothing.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, || Ok(())) };
    assert!(command.status().unwrap().success());
    assert!(data.iter().copied().eq(0..200_000));
    drop(data);
    hmm.shutdown().unwrap();
}

on_each!(another_mapping_that_replaces_device_pages_wins: software, vulkan);
fn another_mapping_that_replaces_device_pages_wins(kind: Kind) {
    let _dog = watchdog("another_mapping_that_replaces_device_pages_wins", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    let map = Map::new(64);
    map.fill(34);
    send(&hmm, map.range(), &device);
    let other = Map::new(16);
    other.fill(35);
    send(&hmm, other.range(), &device);
    // mremap FIXED onto the middle of `map`.
    let moved = other.remap(16, libc::MREMAP_MAYMOVE, Some(map.page(20)));
    moved.check(35);
    map.check_part(0, 20, 34);
    map.check_part(36, 28, 34);
    let range = PageRange::new(VirtAddr::of(map.at()), 64 * PAGE as u64).unwrap();
    send(&hmm, range, &device);
    moved.check(35);
    map.check_part(0, 20, 34);
    map.check_part(36, 28, 34);
    moved.leak();
    drop(map);
    end(hmm, &device);
}

on_each!(memory_remapped_to_where_other_memory_was_is_kept: software, vulkan);
/// One mremap is reported twice; in between, another thread's memory arrives
/// where the first thread's was.
fn memory_remapped_to_where_other_memory_was_is_kept(kind: Kind) {
    const FEW: usize = 16;
    const ROUNDS: u32 = 200;
    const TRIES: u32 = 10_000;
    let _dog = watchdog("memory_remapped_to_where_other_memory_was_is_kept", 60);
    let (hmm, device) = or_skip!(open(kind, 8));
    let mut met = 0;
    for _ in 0..ROUNDS {
        let (first, second) = (Map::new(FEW), Map::new(FEW));
        let spare = Map::with(FEW, libc::PROT_NONE, libc::MAP_PRIVATE, -1);
        for (map, seed) in [(&first, 1), (&second, 2)] {
            map.fill(seed);
            hmm.migrate(map.range(), device.id()).unwrap();
        }
        let (place, elsewhere) = (first.at().expose_provenance(), spare.at());
        spare.leak();
        // The second thread has mapped its own stacks when it gets there.
        let started = Barrier::new(2);
        let (first, second) = std::thread::scope(|scope| {
            let started = &started;
            let other = scope.spawn(move || {
                let place = std::ptr::with_exposed_provenance_mut(place);
                started.wait();
                // Now and then something else is mapped there first.
                let free = (0..TRIES).any(|_| reserve(place, FEW));
                let to = free.then_some(place);
                let second = second.remap(FEW, libc::MREMAP_MAYMOVE, to);
                (second, free)
            });
            started.wait();
            let first = first.remap(FEW, libc::MREMAP_MAYMOVE, Some(elsewhere));
            let (second, free) = other.join().unwrap();
            met += u32::from(free);
            (first, second)
        });
        first.check(1);
        second.check(2);
    }
    println!("{met} of {ROUNDS} met");
    assert!(met > ROUNDS / 4);
    hmm.shutdown().unwrap();
}

/// Takes addresses if nothing is mapped there.
fn reserve(at: *mut u8, pages: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: replaces nothing that is mapped.
    let got = unsafe { libc::mmap(at.cast(), pages * PAGE, libc::PROT_NONE, flags, -1, 0) };
    got == at.cast()
}
