//! What a program tells the kernel about its memory (madvise, mlock, KSM, parts
//! of huge pages) while the memory is at home, on a device or half there: the
//! data stays right, and nothing of the device's or the engine's memory is lost.

#![allow(
    clippy::needless_range_loop,
    reason = "the index names the mix in messages too"
)]
mod common;

use std::io::{Read, Seek, Write};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{
    HUGE, Map, PAGE, Rng, WORDS, adds_up, all_free, engine, fetch, is_root, nothing_staged,
    on_device, pattern, send, watchdog,
};
use hmm::{Hmm, Report, SoftwareDevice, StayReason};

/// Two huge pages.
const PAGES: usize = 2 * HUGE;

/// Ways to have a mapping's pages before something happens to it.
const MIXES: [&str; 4] = [
    "home",
    "all away",
    "second half away",
    "every third page away",
];

fn mix(hmm: &Hmm, device: &SoftwareDevice, map: &Map, how: usize) {
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

fn end(hmm: Hmm, device: &SoftwareDevice) {
    all_free(&hmm, device);
    nothing_staged(&hmm);
    hmm.shutdown().expect("a clean end");
}

/// Every page of `range` stays, for this reason.
fn all_stay(report: &Report, reason: StayReason) -> bool {
    report.moved.get() == 0
        && report.already.get() == 0
        && report.stayed.iter().all(|stay| stay.reason == reason)
}

/// Whether a page on its own holds what it should; the page is untouched
/// otherwise.
fn is_page(map: &Map, page: usize, seed: u64) -> bool {
    map.wrong(page, 1, seed).is_none()
}

/// mlock(2) of some pages, or with a flag mlock2(2).
fn lock(map: &Map, first: usize, pages: usize, flags: u32) -> std::io::Result<()> {
    // SAFETY: locking changes no data.
    match unsafe { libc::mlock2(map.page(first).cast(), pages * PAGE, flags) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn unlock(map: &Map, first: usize, pages: usize) {
    // SAFETY: as for locking.
    let ok = unsafe { libc::munlock(map.page(first).cast(), pages * PAGE) == 0 };
    assert!(ok, "munlock: {}", std::io::Error::last_os_error());
}

/// KiB of the mappings that lie in `map` that smaps counts under `field`.
fn smaps_kib(map: &Map, field: &str) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let (start, end) = (map.at() as usize, map.at() as usize + map.bytes());
    let hex = |text: &str| usize::from_str_radix(text, 16).ok();
    let mut inside = false;
    let mut sum = 0;
    for line in smaps.lines() {
        let head = line
            .split_once(' ')
            .and_then(|(range, _)| range.split_once('-'))
            .and_then(|(from, to)| Some((hex(from)?, hex(to)?)));
        if let Some((from, to)) = head {
            inside = from < end && start < to;
        } else if inside && let Some(rest) = line.strip_prefix(field) {
            let number = rest.trim_start_matches(':').trim().trim_end_matches(" kB");
            sum += number.parse::<u64>().expect("a number of KiB");
        }
    }
    sum
}

/// Memory that consists of huge pages, if the kernel has any to give.
fn huge_map(seed: u64) -> Option<Map> {
    let map = Map::aligned(PAGES, true);
    map.fill(seed);
    (smaps_kib(&map, "AnonHugePages") == (PAGES * PAGE / 1024) as u64).then_some(map)
}

/// Small pages where huge ones are allowed: there is something to collapse.
fn small_map_that_may_collapse(seed: u64) -> Map {
    let map = Map::aligned(PAGES, false);
    map.fill(seed);
    // Refused by kernels without huge pages; then collapsing is refused too.
    let _ = map.advise(0, PAGES, libc::MADV_HUGEPAGE);
    map
}

/// Stops a thread of a scope also when the other one panics.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Moves random parts of `map` out and home while `body` runs. Returns the pages
/// that moved out, and the reasons of those that did not.
fn while_moving(
    hmm: &Hmm,
    device: &SoftwareDevice,
    map: &Map,
    body: impl FnOnce(),
) -> (u64, Vec<StayReason>) {
    let stop = AtomicBool::new(false);
    let started = Barrier::new(2);
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            started.wait();
            let mut rng = Rng::new(7);
            let (mut moved, mut reasons) = (0, Vec::new());
            while !stop.load(Ordering::Relaxed) {
                let first = rng.below(map.pages());
                let most = [1, 16, 64, map.pages()][rng.below(4)];
                let count = 1 + rng.below((map.pages() - first).min(most));
                let range = map.part(first, count);
                if rng.below(3) == 0 {
                    fetch(hmm, range);
                    continue;
                }
                let report = hmm.migrate(range, device.id()).expect("a migration");
                adds_up(&report, range);
                moved += report.moved.get();
                for stay in &report.stayed {
                    if !reasons.contains(&stay.reason) {
                        reasons.push(stay.reason);
                    }
                }
            }
            (moved, reasons)
        });
        {
            let _stop = StopAtEnd(&stop);
            started.wait();
            body();
        }
        mover.join().expect("the mover")
    })
}

#[test]
fn collapse_finds_the_data_wherever_it_is() {
    let _dog = watchdog("collapse_finds_the_data_wherever_it_is", 60);
    let (hmm, device) = engine(16);
    let mut collapsed_at_home = false;
    for how in 0..MIXES.len() {
        let map = small_map_that_may_collapse(1);
        mix(&hmm, &device, &map, how);
        let away = on_device(&hmm, map.range(), &device);
        let done = map.advise(0, PAGES, libc::MADV_COLLAPSE);
        println!("{}: collapsed {done}", MIXES[how]);
        collapsed_at_home |= how == 0 && done;
        // A page that is away must never be filled by the kernel itself.
        assert_eq!(
            on_device(&hmm, map.range(), &device),
            away,
            "{}: collapsing moved pages",
            MIXES[how]
        );
        map.check(1);
        // All home: as huge pages, if the kernel can; and out again as such.
        fetch(&hmm, map.range());
        let done = map.advise(0, PAGES, libc::MADV_COLLAPSE);
        map.check(1);
        map.fill(2);
        let report = send(&hmm, map.range(), &device);
        println!(
            "{}: once home collapsed {done}, {} huge pages left",
            MIXES[how], report.huge
        );
        let _ = map.advise(0, PAGES, libc::MADV_COLLAPSE);
        map.check(2);
    }
    println!("the kernel collapses here: {collapsed_at_home}");
    end(hmm, &device);
}

#[test]
fn pageout_and_cold_lose_nothing() {
    let _dog = watchdog("pageout_and_cold_lose_nothing", 60);
    let (hmm, device) = engine(16);
    for advice in [libc::MADV_PAGEOUT, libc::MADV_COLD] {
        for huge in [false, true] {
            for how in 0..MIXES.len() {
                let what = format!("advice {advice}, huge {huge}, {}", MIXES[how]);
                let map = Map::aligned(PAGES, huge);
                map.fill(3);
                mix(&hmm, &device, &map, how);
                // Parts of huge pages first: the kernel splits them for that.
                for (first, pages) in [(100, 300), (500, 30), (0, PAGES)] {
                    assert!(map.advise(first, pages, advice), "{what}: refused");
                }
                send(&hmm, map.range(), &device);
                assert!(map.advise(0, PAGES, advice), "{what}: refused when away");
                assert_eq!(
                    on_device(&hmm, map.range(), &device),
                    PAGES as u64,
                    "{what}: it touched what is away"
                );
                map.check(3);
                map.fill(4);
                assert!(map.advise(0, PAGES, advice), "{what}: refused at home");
                map.check(4);
            }
        }
    }
    end(hmm, &device);
}

#[test]
fn advice_is_given_while_pages_move() {
    let _dog = watchdog("advice_is_given_while_pages_move", 60);
    let (hmm, device) = engine(16);
    let map = small_map_that_may_collapse(5);
    let (moved, reasons) = while_moving(&hmm, &device, &map, || {
        let since = Instant::now();
        let mut rng = Rng::new(5);
        let mut rounds = 0u32;
        while since.elapsed() < Duration::from_millis(1500) {
            let advice = [
                libc::MADV_COLD,
                libc::MADV_PAGEOUT,
                libc::MADV_COLLAPSE,
                libc::MADV_NORMAL,
            ][rng.below(4)];
            let first = rng.below(PAGES);
            // Collapsing may be refused; the others cannot go wrong.
            let done = map.advise(first, PAGES - first, advice);
            assert!(
                done || advice == libc::MADV_COLLAPSE,
                "advice {advice}: {}",
                std::io::Error::last_os_error()
            );
            map.check_part(rng.below(PAGES), 1, 5);
            rounds += 1;
        }
        println!("{rounds} rounds");
    });
    println!("{moved} pages moved out, some stayed: {reasons:?}");
    assert!(moved > 0, "nothing moved meanwhile");
    map.check(5);
    drop(map);
    end(hmm, &device);
}

#[test]
fn locked_pages_stay_and_move_when_unlocked() {
    let _dog = watchdog("locked_pages_stay_and_move_when_unlocked", 60);
    let (hmm, device) = engine(16);
    for huge in [false, true] {
        let map = Map::aligned(PAGES, huge);
        map.fill(6);
        // The middle only: pages of both huge pages.
        let (first, pages) = (200, 500);
        if let Err(error) = lock(&map, first, pages, 0) {
            skip!("mlock: {error}");
        }
        let report = hmm.migrate(map.range(), device.id()).expect("a migration");
        adds_up(&report, map.range());
        for stay in &report.stayed {
            assert_eq!(stay.reason, StayReason::Locked, "huge {huge}: {report}");
        }
        assert_eq!(
            report.stayed_pages.get(),
            pages as u64,
            "huge {huge}: the locked pages stay, and no others: {report}"
        );
        assert_eq!(
            on_device(&hmm, map.part(first, pages), &device),
            0,
            "huge {huge}: a locked page has left"
        );
        map.check(6);
        unlock(&map, first, pages);
        send(&hmm, map.range(), &device);
        map.check(6);
    }
    end(hmm, &device);
}

#[test]
fn locking_pages_that_are_away_keeps_their_data() {
    let _dog = watchdog("locking_pages_that_are_away_keeps_their_data", 60);
    let (hmm, device) = engine(16);
    for how in 0..MIXES.len() {
        let map = Map::aligned(PAGES, false);
        map.fill(7);
        mix(&hmm, &device, &map, how);
        match lock(&map, 0, PAGES, 0) {
            Ok(()) => assert_eq!(
                on_device(&hmm, map.range(), &device),
                0,
                "{}: locked, but not in memory",
                MIXES[how]
            ),
            // The kernel cannot have the pages brought home for ordinary users.
            // They are marked as locked nevertheless.
            Err(error) => {
                assert!(
                    how != 0 && !hmm.serves_kernel_faults(),
                    "{}: mlock: {error}",
                    MIXES[how]
                );
                println!("{}: mlock: {error}", MIXES[how]);
            }
        }
        map.check(7);
        let report = hmm.migrate(map.range(), device.id()).expect("a migration");
        adds_up(&report, map.range());
        assert!(
            all_stay(&report, StayReason::Locked),
            "{}: {report}",
            MIXES[how]
        );
        map.check(7);
        unlock(&map, 0, PAGES);
        send(&hmm, map.range(), &device);
        map.check(7);
    }
    end(hmm, &device);
}

/// MLOCK_ONFAULT leaves pages where they are and locks them when they come. The
/// kernel does not move unlocked staging pages into locked memory.
#[test]
fn pages_come_home_into_locked_memory() {
    let _dog = watchdog("pages_come_home_into_locked_memory", 60);
    let (hmm, device) = engine(16);
    for how in 0..MIXES.len() {
        for by_touch in [true, false] {
            let map = Map::aligned(PAGES, false);
            map.fill(8);
            mix(&hmm, &device, &map, how);
            let away = on_device(&hmm, map.range(), &device);
            if let Err(error) = lock(&map, 0, PAGES, libc::MLOCK_ONFAULT) {
                skip!("mlock2 with MLOCK_ONFAULT: {error}");
            }
            assert_eq!(
                on_device(&hmm, map.range(), &device),
                away,
                "{}: nothing moves by that",
                MIXES[how]
            );
            if by_touch {
                map.check(8);
            } else {
                let report = fetch(&hmm, map.range());
                assert!(report.is_complete(), "{}: {report}", MIXES[how]);
            }
            assert_eq!(
                on_device(&hmm, map.range(), &device),
                0,
                "{}: all home",
                MIXES[how]
            );
            map.check(8);
            let report = hmm.migrate(map.range(), device.id()).expect("a migration");
            assert!(
                all_stay(&report, StayReason::Locked),
                "{}: {report}",
                MIXES[how]
            );
            unlock(&map, 0, PAGES);
            map.fill(9);
            send(&hmm, map.range(), &device);
            map.check(9);
        }
    }
    end(hmm, &device);
}

#[test]
fn memory_is_locked_and_unlocked_while_pages_move() {
    let _dog = watchdog("memory_is_locked_and_unlocked_while_pages_move", 60);
    let (hmm, device) = engine(16);
    let map = Map::aligned(PAGES, false);
    map.fill(10);
    let (moved, reasons) = while_moving(&hmm, &device, &map, || {
        let since = Instant::now();
        let mut rng = Rng::new(10);
        while since.elapsed() < Duration::from_millis(1200) {
            let first = rng.below(PAGES);
            let pages = 1 + rng.below(PAGES - first);
            let flags = [0, libc::MLOCK_ONFAULT][rng.below(2)];
            if let Err(error) = lock(&map, first, pages, flags) {
                assert!(!hmm.serves_kernel_faults(), "mlock: {error}");
            }
            map.check_part(rng.below(PAGES), 1, 10);
            unlock(&map, 0, PAGES);
            map.check_part(rng.below(PAGES), 1, 10);
        }
    });
    println!("{moved} pages moved out, some stayed: {reasons:?}");
    assert!(moved > 0, "nothing moved meanwhile");
    map.check(10);
    send(&hmm, map.range(), &device);
    map.check(10);
    drop(map);
    end(hmm, &device);
}

const KSM_RUN: &str = "/sys/kernel/mm/ksm/run";

/// Has the kernel merge pages; leaves the setting as it was, also in a panic.
struct Merging {
    before: String,
    /// Locked: another run of this test must not take the setting away.
    file: std::fs::File,
}

impl Merging {
    fn start() -> std::io::Result<Self> {
        let mut file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(KSM_RUN)?;
        file.lock()?;
        let mut before = String::new();
        file.read_to_string(&mut before)?;
        let mut merging = Self { before, file };
        merging.set("1")?;
        Ok(merging)
    }

    fn set(&mut self, value: &str) -> std::io::Result<()> {
        self.file.rewind()?;
        self.file.write_all(value.as_bytes())
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        let before = self.before.trim().to_owned();
        if let Err(error) = self.set(&before) {
            eprintln!("{KSM_RUN} cannot be set back to {before}: {error}");
        }
    }
}

/// Pages of this process that are merged now.
fn merged() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/ksm_merging_pages").ok()?;
    text.trim().parse().ok()
}

/// Waits until so many pages are merged; false when it takes too long.
fn wait_for_merged(pages: u64) -> bool {
    let since = Instant::now();
    while merged().is_none_or(|now| now < pages) {
        if since.elapsed() > Duration::from_secs(8) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Contents that many pages of the KSM test share.
const KINDS: usize = 4;

fn fill_alike(map: &Map, seed: u64) {
    for page in 0..map.pages() {
        for word in 0..WORDS {
            let value = pattern(seed + (page % KINDS) as u64, word);
            map.set(page * WORDS + word, value);
        }
    }
}

/// Checks all pages but those with a pattern of their own.
#[track_caller]
fn check_alike(map: &Map, seed: u64, but: impl Fn(usize) -> bool) {
    for page in (0..map.pages()).filter(|&page| !but(page)) {
        for word in 0..WORDS {
            let (value, right) = (
                map.get(page * WORDS + word),
                pattern(seed + (page % KINDS) as u64, word),
            );
            assert_eq!(value, right, "page {page} word {word}");
        }
    }
}

/// Migrates merged memory: what stays may do so for these reasons only.
fn migrate_merged(hmm: &Hmm, device: &SoftwareDevice, map: &Map) -> Report {
    let report = hmm.migrate(map.range(), device.id()).expect("a migration");
    adds_up(&report, map.range());
    for stay in &report.stayed {
        assert!(
            matches!(
                stay.reason,
                StayReason::SharedCow | StayReason::Busy | StayReason::Pinned
            ),
            "merged pages: {report}"
        );
    }
    report
}

/// One test, as the kernel's setting is one for all.
#[test]
fn merged_pages_move_and_stay_apart_when_written() {
    const ALIKE: usize = 128;
    let _dog = watchdog("merged_pages_move_and_stay_apart_when_written", 60);
    if !is_root() {
        skip!("only root can have the kernel merge pages ({KSM_RUN})");
    }
    if merged().is_none() {
        skip!("the kernel does not tell how many pages of a process are merged");
    }
    let _merging = match Merging::start() {
        Ok(merging) => merging,
        Err(error) => skip!("{KSM_RUN}: {error}"),
    };
    let (hmm, device) = engine(16);
    for how in 0..MIXES.len() {
        let map = Map::new(ALIKE);
        fill_alike(&map, 100);
        mix(&hmm, &device, &map, how);
        let away = on_device(&hmm, map.range(), &device);
        assert!(
            map.advise(0, ALIKE, libc::MADV_MERGEABLE),
            "madvise: {}",
            std::io::Error::last_os_error()
        );
        // Only what is at home can be merged; most of it soon is.
        let home = ALIKE as u64 - away;
        if !wait_for_merged(home * 3 / 4) {
            drop(map);
            end(hmm, &device);
            skip!("nothing merges within some seconds");
        }
        assert_eq!(
            on_device(&hmm, map.range(), &device),
            away,
            "{}: merging touches nothing that is away",
            MIXES[how]
        );
        let report = migrate_merged(&hmm, &device, &map);
        println!("{}: {} merged: {report}", MIXES[how], home);
        check_alike(&map, 100, |_| false);
        // Merged again at home; then each twentieth page is written.
        if !wait_for_merged(ALIKE as u64 * 3 / 4) {
            println!("{}: only {:?} merged again", MIXES[how], merged());
        }
        let written = |page: usize| page.is_multiple_of(20);
        migrate_merged(&hmm, &device, &map);
        for page in (0..ALIKE).filter(|&page| written(page)) {
            map.fill_part(page, 1, 200);
        }
        let check = |when: &str| {
            check_alike(&map, 100, written);
            for page in (0..ALIKE).filter(|&page| written(page)) {
                assert!(
                    is_page(&map, page, 200),
                    "{} {when}: page {page}",
                    MIXES[how]
                );
            }
        };
        check("after the writes");
        // And the device writes to merged pages, wherever they are by then.
        migrate_merged(&hmm, &device, &map);
        let first = hmm::Pointer::new(map.word(0));
        device
            .launch(ALIKE, |context, page| {
                if written(page) {
                    for word in 0..WORDS {
                        let index = page * WORDS + word;
                        context.store(first.at(index), pattern(200, index))?;
                    }
                }
                Ok(())
            })
            .expect("a kernel");
        check("after the device's writes");
        fetch(&hmm, map.range());
        check("at home");
    }
    // The kernel merges while pages move.
    let map = Map::new(ALIKE);
    fill_alike(&map, 300);
    assert!(map.advise(0, ALIKE, libc::MADV_MERGEABLE), "MADV_MERGEABLE");
    let mut most = 0;
    let (moved, reasons) = while_moving(&hmm, &device, &map, || {
        let since = Instant::now();
        let mut rng = Rng::new(300);
        while since.elapsed() < Duration::from_secs(1) {
            let page = rng.below(ALIKE);
            // Written with what is there: another page must not change by it.
            map.set(page * WORDS + 5, pattern(300 + (page % KINDS) as u64, 5));
            check_alike(&map, 300, |other| other % 16 != page % 16);
            most = most.max(merged().unwrap_or(0));
        }
    });
    println!("{moved} pages moved out, at most {most} merged, some stayed: {reasons:?}");
    assert!(moved > 0, "nothing moved meanwhile");
    check_alike(&map, 300, |_| false);
    drop(map);
    end(hmm, &device);
}

/// What is done to a part of a huge page.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Unmap,
    ReadOnly,
    NoAccess,
    Drop,
    Send,
    Fetch,
}

/// Where the part lies: in one huge page, at its end, over both.
const CUTS: [(usize, usize); 4] = [(3, 100), (HUGE - 40, 40), (HUGE - 1, 2), (200, 600)];

fn cut(hmm: &Hmm, device: &SoftwareDevice, map: &Map, how: Cut, first: usize, pages: usize) {
    match how {
        Cut::Unmap => map.unmap_part(first, pages),
        Cut::ReadOnly => map.protect(first, pages, libc::PROT_READ),
        Cut::NoAccess => map.protect(first, pages, libc::PROT_NONE),
        Cut::Drop => assert!(
            map.advise(first, pages, libc::MADV_DONTNEED),
            "MADV_DONTNEED"
        ),
        Cut::Send => drop(send(hmm, map.part(first, pages), device)),
        Cut::Fetch => drop(fetch(hmm, map.part(first, pages))),
    }
}

/// The rest of the memory is as it was, and the part is what it should be.
#[track_caller]
fn check_cut(map: &Map, how: Cut, first: usize, pages: usize, seed: u64) {
    map.check_part(0, first, seed);
    map.check_part(first + pages, PAGES - first - pages, seed);
    match how {
        Cut::Unmap | Cut::NoAccess => {}
        Cut::Drop => map.check_zero(first, pages),
        Cut::ReadOnly | Cut::Send | Cut::Fetch => map.check_part(first, pages, seed),
    }
}

#[test]
fn huge_pages_are_cut_before_and_while_they_are_away() {
    let _dog = watchdog("huge_pages_are_cut_before_and_while_they_are_away", 60);
    let (hmm, device) = engine(16);
    if huge_map(11).is_none() {
        skip!("the kernel gives no transparent huge pages here");
    }
    let all = [
        Cut::Unmap,
        Cut::ReadOnly,
        Cut::NoAccess,
        Cut::Drop,
        Cut::Send,
        Cut::Fetch,
    ];
    for how in all {
        // Before it goes; while all is away; while another part is away.
        for when in 0..3 {
            for (first, pages) in CUTS {
                let Some(map) = huge_map(11) else {
                    continue;
                };
                match when {
                    0 => {}
                    1 => drop(send(&hmm, map.range(), &device)),
                    _ => drop(send(&hmm, map.part(first + pages / 2, 150), &device)),
                }
                cut(&hmm, &device, &map, how, first, pages);
                let what = format!("{how:?} of {pages} pages at {first}, case {when}");
                println!("{what}");
                // All that can go, goes; what cannot says why.
                for _ in 0..2 {
                    let report = hmm.migrate(map.range(), device.id()).expect("a migration");
                    adds_up(&report, map.range());
                    for stay in &report.stayed {
                        let expected = match how {
                            Cut::Unmap => stay.reason == StayReason::NotMapped,
                            Cut::NoAccess => stay.reason == StayReason::NoAccess,
                            // Huge pages that are being split are busy.
                            _ => matches!(stay.reason, StayReason::Busy | StayReason::Discarded),
                        };
                        assert!(expected, "{what}: {report}");
                    }
                }
                check_cut(&map, how, first, pages, 11);
                fetch(&hmm, map.range());
                check_cut(&map, how, first, pages, 11);
                if matches!(how, Cut::ReadOnly | Cut::NoAccess) {
                    map.protect(first, pages, libc::PROT_READ | libc::PROT_WRITE);
                    map.check(11);
                    map.fill_part(first, pages, 11);
                    send(&hmm, map.range(), &device);
                    map.check(11);
                }
            }
        }
    }
    end(hmm, &device);
}

/// A part of what is away is dropped, protected and unmapped, one after another,
/// while another thread moves everything.
#[test]
fn huge_pages_are_cut_while_they_move() {
    let _dog = watchdog("huge_pages_are_cut_while_they_move", 60);
    let (hmm, device) = engine(16);
    let since = Instant::now();
    let mut rng = Rng::new(12);
    let mut moved_in_all = 0;
    while since.elapsed() < Duration::from_millis(1500) {
        let Some(map) = huge_map(12) else {
            skip!("the kernel gives no transparent huge pages here");
        };
        let (first, pages) = CUTS[rng.below(CUTS.len())];
        // The part's neighbours are looked at; the part itself changes.
        let (moved, _) = while_moving(&hmm, &device, &map, || {
            for _ in 0..10 {
                let how = [Cut::Drop, Cut::ReadOnly, Cut::NoAccess][rng.below(3)];
                cut(&hmm, &device, &map, how, first, pages);
                if matches!(how, Cut::Drop) {
                    map.check_zero(first, pages);
                }
                map.protect(first, pages, libc::PROT_READ | libc::PROT_WRITE);
                map.fill_part(first, pages, 12);
                map.check_part(first, pages, 12);
                map.check_part(rng.below(first), 1, 12);
            }
        });
        moved_in_all += moved;
        map.check(12);
    }
    println!("{moved_in_all} pages moved out meanwhile");
    assert!(moved_in_all > 0, "nothing moved meanwhile");
    end(hmm, &device);
}

/// MADV_FREE: until the kernel takes the pages, they hold what they held; then
/// zeros. MADV_PAGEOUT has it take them now.
#[test]
fn freed_pages_hold_their_data_or_zeros() {
    let _dog = watchdog("freed_pages_hold_their_data_or_zeros", 60);
    let (hmm, device) = engine(16);
    for huge in [false, true] {
        for reclaim in [false, true] {
            for how in 0..MIXES.len() {
                let what = format!("huge {huge}, reclaim {reclaim}, {}", MIXES[how]);
                let map = Map::aligned(PAGES, huge);
                map.fill(13);
                mix(&hmm, &device, &map, how);
                // Parts of both huge pages.
                let (first, pages) = (100, 700);
                assert!(map.advise(first, pages, libc::MADV_FREE), "{what}: refused");
                // Some are written anew, and keep that.
                let anew = |page: usize| page.is_multiple_of(50);
                for page in (first..first + pages).filter(|&page| anew(page)) {
                    map.fill_part(page, 1, 14);
                }
                if reclaim {
                    assert!(map.advise(0, PAGES, libc::MADV_PAGEOUT), "{what}: refused");
                }
                let mut zeros = 0;
                let mut check = |when: &str| {
                    map.check_part(0, first, 13);
                    map.check_part(first + pages, PAGES - first - pages, 13);
                    for page in first..first + pages {
                        if anew(page) {
                            assert!(
                                is_page(&map, page, 14),
                                "{what}, {when}: page {page} was written anew and is lost"
                            );
                        } else if map.not_zero(page, 1).is_none() {
                            zeros += 1;
                        } else {
                            assert!(
                                is_page(&map, page, 13),
                                "{what}, {when}: page {page} is neither old nor zero"
                            );
                        }
                    }
                };
                check("after MADV_FREE");
                for _ in 0..2 {
                    let report = hmm.migrate(map.range(), device.id()).expect("a migration");
                    adds_up(&report, map.range());
                    for stay in &report.stayed {
                        assert_eq!(stay.reason, StayReason::Discarded, "{what}: {report}");
                    }
                    check("after a migration");
                }
                println!("{what}: {zeros} pages of zeros");
                // What is written now stays, whatever is reclaimed.
                map.fill(15);
                if reclaim {
                    assert!(map.advise(0, PAGES, libc::MADV_PAGEOUT), "{what}: refused");
                }
                map.check(15);
                fetch(&hmm, map.range());
                map.check(15);
            }
        }
    }
    end(hmm, &device);
}

/// Freed before the engine knows the memory: no event tells of it. Such pages
/// move, pass through staging, and other data comes home in the same pages; they
/// must not be taken for free ones.
#[test]
fn pages_freed_before_the_engine_saw_them_keep_new_data() {
    let _dog = watchdog("pages_freed_before_the_engine_saw_them_keep_new_data", 60);
    for huge in [false, true] {
        let (hmm, device) = engine(16);
        let map = Map::aligned(PAGES, huge);
        map.fill(16);
        assert!(map.advise(0, PAGES, libc::MADV_FREE), "MADV_FREE");
        // Every second page is the program's again.
        for page in (0..PAGES).step_by(2) {
            map.set(page * WORDS, pattern(16, page * WORDS));
        }
        let check = |when: &str| {
            for page in 0..PAGES {
                assert!(
                    is_page(&map, page, 16)
                        || !page.is_multiple_of(2) && map.not_zero(page, 1).is_none(),
                    "huge {huge}, {when}: page {page} holds {:#x}",
                    map.get(page * WORDS)
                );
            }
        };
        let report = hmm.migrate(map.range(), device.id()).expect("a migration");
        adds_up(&report, map.range());
        println!("huge {huge}: {report}");
        // Other memory comes home through the staging pages that were free ones.
        let other = Map::aligned(PAGES, huge);
        other.fill(17);
        for _ in 0..3 {
            send(&hmm, other.range(), &device);
            fetch(&hmm, other.range());
            for map in [&map, &other] {
                assert!(map.advise(0, PAGES, libc::MADV_PAGEOUT), "MADV_PAGEOUT");
            }
            other.check(17);
        }
        check("away");
        fetch(&hmm, map.range());
        assert!(map.advise(0, PAGES, libc::MADV_PAGEOUT), "MADV_PAGEOUT");
        check("at home");
        drop((map, other));
        end(hmm, &device);
    }
}

/// Pages are freed and written while they move, and perhaps reclaimed.
fn freed_while_moving(reclaims: bool) {
    let (hmm, device) = engine(16);
    let since = Instant::now();
    let mut rng = Rng::new(18);
    let mut moved_in_all = 0;
    while since.elapsed() < Duration::from_millis(1500) {
        let map = Map::aligned(PAGES, rng.below(2) == 0);
        map.fill(18);
        let (moved, _) = while_moving(&hmm, &device, &map, || {
            for _ in 0..4 {
                let first = rng.below(PAGES - 200);
                assert!(map.advise(first, 200, libc::MADV_FREE), "MADV_FREE");
                if reclaims && rng.below(2) == 0 {
                    assert!(map.advise(first, 200, libc::MADV_PAGEOUT), "MADV_PAGEOUT");
                }
                check_old_or_zero(&map, first, 200, 18);
                map.fill_part(first, 200, 18);
                map.check(18);
            }
        });
        moved_in_all += moved;
        map.check(18);
    }
    println!("{moved_in_all} pages moved out meanwhile");
    assert!(moved_in_all > 0, "nothing moved meanwhile");
    end(hmm, &device);
}

#[test]
fn pages_are_freed_while_they_move() {
    let _dog = watchdog("pages_are_freed_while_they_move", 60);
    freed_while_moving(false);
}

#[track_caller]
fn check_old_or_zero(map: &Map, first: usize, pages: usize, seed: u64) {
    for page in first..first + pages {
        assert!(
            is_page(map, page, seed) || map.not_zero(page, 1).is_none(),
            "page {page} is neither old nor zero: {:#x}",
            map.get(page * WORDS)
        );
    }
}

/// The kernel takes freed pages back while they move. It does so at any time
/// under memory pressure; MADV_PAGEOUT makes it do so now.
#[test]
#[ignore = "forces a race in which UFFDIO_MOVE may never return (docs/kernel-notes.md); 92 runs were right"]
fn the_kernel_takes_freed_pages_while_they_move() {
    let _dog = watchdog("the_kernel_takes_freed_pages_while_they_move", 40);
    freed_while_moving(true);
}

/// The same with memory that was freed before the engine knew it, as an
/// allocator does that gives memory back lazily: no event tells of it.
#[test]
fn the_kernel_takes_pages_that_were_freed_before_the_engine_saw_them() {
    let _dog = watchdog("the_kernel_takes_pages_that_were_freed_before", 40);
    let (hmm, device) = engine(16);
    let since = Instant::now();
    let mut moved_in_all = 0;
    while since.elapsed() < Duration::from_millis(1500) {
        let map = Map::aligned(PAGES, false);
        map.fill(19);
        assert!(map.advise(0, PAGES, libc::MADV_FREE), "MADV_FREE");
        let (moved, _) = while_moving(&hmm, &device, &map, || {
            // Bit by bit, so that it meets pages that are just leaving.
            for first in (0..PAGES).step_by(64) {
                let done = map.advise(first, 64, libc::MADV_PAGEOUT);
                assert!(done, "MADV_PAGEOUT");
            }
        });
        moved_in_all += moved;
        check_old_or_zero(&map, 0, PAGES, 19);
    }
    println!("{moved_in_all} pages moved out meanwhile");
    assert!(moved_in_all > 0, "nothing moved meanwhile");
    end(hmm, &device);
}
