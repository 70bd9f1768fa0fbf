//! Pages of hugetlbfs of a gigabyte: they leave and come home whole, through what a
//! program may do to them. Two are reserved for these tests while they run, which
//! takes root and a machine that has them.
mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{
    HUGE, Map, WORDS, adds_up, all_free, device, engine, engine_of, fetch, fork, helper,
    nothing_staged, on_device, role, run, send, signal_of_lost_data, wait, watchdog,
};
use hmm::{Disable, Hmm, LossMode, MirrorEntry, Pointer, SoftwareDevice, StayReason};

/// Small pages of one.
const GIGABYTE: usize = 512 * HUGE;
/// A device that holds one, and little else; and the same for two.
const ONE: u64 = 1024 + 16;
const TWO: u64 = 2048 + 16;
/// Every so many pages one is looked at.
const STRIDE: usize = 61;

/// Reserved pages of a gigabyte, given back at the end; for one test at a time.
struct Gigabytes {
    _turn: File,
}

impl Gigabytes {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";

    fn reserve(pages: usize) -> Result<Self, String> {
        let lock = std::env::temp_dir().join("hmm-hugetlb-test.lock");
        let turn = File::create(&lock).map_err(|error| format!("{}: {error}", lock.display()))?;
        // SAFETY: a lock on a file of these tests' own.
        if unsafe { libc::flock(turn.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(format!("flock: {}", std::io::Error::last_os_error()));
        }
        let reserved = Self { _turn: turn };
        let got = reserved.set(pages).map_err(|error| error.to_string())?;
        if got == pages {
            Ok(reserved)
        } else {
            Err(format!("{got} pages after {pages} were asked for"))
        }
    }

    /// Has the kernel keep so many; how many it keeps.
    fn set(&self, pages: usize) -> std::io::Result<usize> {
        std::fs::write(Self::POOL, pages.to_string())?;
        let pool = std::fs::read_to_string(Self::POOL)?;
        Ok(pool.trim().parse().unwrap_or(usize::MAX))
    }
}

impl Drop for Gigabytes {
    fn drop(&mut self) {
        if let Err(error) = self.set(0) {
            println!("pages of 1 GiB stay reserved: {error}");
        }
    }
}

macro_rules! gigabytes {
    ($pages:expr) => {
        match Gigabytes::reserve($pages) {
            Ok(reserved) => reserved,
            Err(why) => skip!("no pages of 1 GiB can be reserved: {why}"),
        }
    };
}

fn gigantic(pages: usize) -> Map {
    gigantic_with(pages, libc::MAP_PRIVATE)
}

fn gigantic_with(pages: usize, flags: i32) -> Map {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = flags | libc::MAP_HUGETLB | libc::MAP_HUGE_1GB;
    Map::with(pages * GIGABYTE, access, flags, -1)
}

/// A word in each of the pages that are looked at.
fn words(map: &Map) -> impl Iterator<Item = usize> {
    (0..map.pages())
        .step_by(STRIDE)
        .map(|page| page * WORDS + page % WORDS)
}

fn mark(map: &Map, seed: usize) {
    words(map).for_each(|word| map.set(word, (word * 7 + seed) as u64));
}

fn is_marked(map: &Map, seed: usize) -> bool {
    words(map).all(|word| map.get(word) == (word * 7 + seed) as u64)
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
fn a_whole_gigabyte_leaves_and_comes_home() {
    let _pool = gigabytes!(2);
    let _dog = watchdog("a_whole_gigabyte_leaves_and_comes_home", 120);
    let (hmm, device) = engine(TWO);
    let map = gigantic(2);
    map.fill(1);
    for round in 0..2 {
        let report = send(&hmm, map.range(), &device);
        assert_eq!(report.moved.get(), map.pages() as u64, "{report}");
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
    // A kernel's own fault takes all of the page along, and a touch brings it back.
    let word = GIGABYTE * WORDS + 777 * WORDS + 3;
    add_by_device(&device, &map, word, 7);
    assert_eq!(
        on_device(&hmm, map.range(), &device),
        GIGABYTE as u64,
        "the kernel had it moved"
    );
    assert_eq!(map.get(word), common::pattern(1, word) + 7);
    assert_eq!(on_device(&hmm, map.range(), &device), 0);
    drop(map);
    end(hmm, &device);
}

/// A request for a part is about that part; the page goes whole.
#[test]
fn a_part_takes_the_gigabyte_along() {
    let _pool = gigabytes!(1);
    let _dog = watchdog("a_part_takes_the_gigabyte_along", 120);
    let (hmm, device) = engine(ONE);
    let map = gigantic(1);
    mark(&map, 2);
    let part = map.part(GIGABYTE - 1000, 7);
    let report = hmm.migrate(part, device.id()).unwrap();
    adds_up(&report, part);
    assert!(report.is_complete(), "{report}");
    assert_eq!(report.moved.get(), 7, "{report}");
    assert_eq!(on_device(&hmm, map.range(), &device), GIGABYTE as u64);
    let report = fetch(&hmm, map.part(100, 1));
    assert_eq!(report.moved.get(), 1, "{report}");
    assert_eq!(on_device(&hmm, map.range(), &device), 0);
    assert!(is_marked(&map, 2));
    drop(map);
    end(hmm, &device);
}

/// What nobody has touched is zeros, for the CPU and for a device; so is what the
/// program drops, wherever it is.
#[test]
fn holes_and_drops_are_zeros() {
    let _pool = gigabytes!(2);
    let _dog = watchdog("holes_and_drops_are_zeros", 120);
    let (hmm, device) = engine(TWO);
    let map = gigantic(2);
    // Registered as a whole; the second page is a hole still.
    let report = send(&hmm, map.part(0, 1), &device);
    assert_eq!(report.moved.get(), 1, "{report}");
    map.set((GIGABYTE + 999) * WORDS, 5);
    assert_eq!(map.get((GIGABYTE + 999) * WORDS), 5);
    map.check_zero(GIGABYTE + 1000, GIGABYTE - 1000);
    map.check_zero(0, GIGABYTE);
    mark(&map, 3);
    send(&hmm, map.range(), &device);
    assert!(map.advise(0, GIGABYTE, libc::MADV_DONTNEED));
    map.check_zero(0, GIGABYTE);
    let rest = words(&map).filter(|&word| word >= GIGABYTE * WORDS);
    for word in rest {
        assert_eq!(map.get(word), (word * 7 + 3) as u64);
    }
    // A hole again, which the device has first.
    assert!(map.advise(GIGABYTE, GIGABYTE, libc::MADV_DONTNEED));
    add_by_device(&device, &map, GIGABYTE * WORDS + 1, 4);
    assert_eq!(map.get(GIGABYTE * WORDS + 1), 4);
    drop(map);
    end(hmm, &device);
}

#[test]
fn a_gigabyte_is_unmapped_remapped_and_protected_while_away() {
    let _dog = watchdog(
        "a_gigabyte_is_unmapped_remapped_and_protected_while_away",
        120,
    );
    let _pool = gigabytes!(2);
    let (hmm, device) = engine(TWO);
    let map = gigantic(2);
    mark(&map, 4);
    send(&hmm, map.range(), &device);
    map.unmap_part(GIGABYTE, GIGABYTE);
    let at = map.at();
    map.leak();
    let map = Map::adopt(at, GIGABYTE);
    assert_eq!(on_device(&hmm, map.range(), &device), GIGABYTE as u64);
    assert!(device.free_memory().get() >= 1 << 30, "the other is free");
    // Room for the new place that is aligned as the kernel wants it.
    let room = Map::new(2 * GIGABYTE);
    let to = room.at().map_addr(|at| at.next_multiple_of(1 << 30));
    drop(room);
    let map = map.remap(GIGABYTE, libc::MREMAP_MAYMOVE, Some(to));
    assert_eq!(on_device(&hmm, map.range(), &device), GIGABYTE as u64);
    map.protect(0, GIGABYTE, libc::PROT_READ);
    let seen = (0..map.pages()).step_by(STRIDE).all(|page| {
        let word = page * WORDS + page % WORDS;
        map.get(word) == (word * 7 + 4) as u64
    });
    assert!(seen);
    // Read-only memory leaves and comes back as well.
    send(&hmm, map.range(), &device);
    map.protect(0, GIGABYTE, libc::PROT_READ | libc::PROT_WRITE);
    assert!(is_marked(&map, 4));
    send(&hmm, map.range(), &device);
    drop(map);
    end(hmm, &device);
}

/// Threads and a device count in a page that goes back and forth: no write is lost.
#[test]
fn writers_race_with_a_gigabyte() {
    const TIME: Duration = Duration::from_secs(8);
    let _pool = gigabytes!(1);
    let _dog = watchdog("writers_race_with_a_gigabyte", 150);
    let (hmm, device) = engine(ONE);
    let map = gigantic(1);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let by_device = AtomicU64::new(0);
    let until = Instant::now() + TIME;
    let mut left = 0;
    std::thread::scope(|scope| {
        for number in 0..2usize {
            let (map, stop, written) = (&map, &stop, &written);
            scope.spawn(move || {
                let mut count = 0usize;
                while !stop.load(Ordering::Relaxed) {
                    // A word of this thread's own in each page.
                    let word = (count * 577 % 1024) * 255 * WORDS + number;
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
                add_by_device(device, map, (index % 1024) * 255 * WORDS + 5, 1);
                by_device.fetch_add(1, Ordering::Relaxed);
                index += 311;
            }
        });
        while Instant::now() < until {
            let report = hmm.migrate(map.range(), device.id()).unwrap();
            adds_up(&report, map.range());
            left += u64::from(report.moved.get() > 0);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(left > 1, "it left {left} times");
    let sum = |word: usize| {
        (0..1024)
            .map(|page| map.get(page * 255 * WORDS + word))
            .sum::<u64>()
    };
    assert_eq!(sum(0) + sum(1), written.into_inner());
    assert_eq!(sum(5), by_device.into_inner());
    drop(map);
    end(hmm, &device);
}

/// A thread drops its page again and again while it migrates: a drop is announced
/// before it is done, so it may come at any moment of that.
#[test]
fn a_dropper_races_with_a_gigabyte() {
    const TIME: Duration = Duration::from_secs(6);
    let _pool = gigabytes!(1);
    let _dog = watchdog("a_dropper_races_with_a_gigabyte", 150);
    let (hmm, device) = engine(ONE);
    let map = gigantic(1);
    let running = AtomicBool::new(true);
    let until = Instant::now() + TIME;
    std::thread::scope(|scope| {
        let (map, running) = (&map, &running);
        scope.spawn(move || {
            let words = [3, 200_000 * WORDS, 262_143 * WORDS + 9];
            for round in 1.. {
                if Instant::now() > until {
                    break;
                }
                words.iter().for_each(|&word| map.set(word, round));
                // Somewhere in the middle of its way.
                std::thread::sleep(Duration::from_millis(round * 37 % 400));
                for word in words {
                    assert_eq!(map.get(word), round);
                }
                std::thread::sleep(Duration::from_millis(round * 53 % 400));
                assert!(map.advise(0, GIGABYTE, libc::MADV_DONTNEED));
                for word in words {
                    assert_eq!(map.get(word), 0, "round {round}");
                }
            }
            running.store(false, Ordering::Relaxed);
        });
        while running.load(Ordering::Relaxed) {
            let report = hmm.migrate(map.range(), device.id()).unwrap();
            adds_up(&report, map.range());
        }
    });
    drop(map);
    end(hmm, &device);
}

/// A child has what the parent had: the page that is away becomes its own when it
/// touches it, whatever parent and device do to theirs.
#[test]
fn a_child_has_the_gigabyte_that_was_away() {
    let _pool = gigabytes!(2);
    let _dog = watchdog("a_child_has_the_gigabyte_that_was_away", 120);
    let (hmm, device) = engine(ONE);
    let map = gigantic(1);
    mark(&map, 6);
    send(&hmm, map.range(), &device);
    let child = fork(|| {
        let found = is_marked(&map, 6);
        mark(&map, 8);
        i32::from(!(found && is_marked(&map, 8)))
    });
    // A device that writes to what a child still needs gets frames of its own.
    add_by_device(&device, &map, 2, 1);
    assert_eq!(map.get(2), 1);
    assert!(is_marked(&map, 6));
    assert_eq!(wait(child), 0);
    assert!(is_marked(&map, 6));
    drop(map);
    end(hmm, &device);
}

/// A child that can get no page waits and holds up nobody; what it is owed goes with
/// it.
#[test]
fn a_child_without_a_gigabyte_holds_up_nobody() {
    let _pool = gigabytes!(1);
    let _dog = watchdog("a_child_without_a_gigabyte_holds_up_nobody", 120);
    let (hmm, device) = engine(ONE + 1024);
    let (map, other) = (gigantic(1), Map::new(64));
    mark(&map, 7);
    send(&hmm, map.range(), &device);
    let child = fork(|| {
        // SAFETY: only sleeps.
        unsafe { libc::sleep(1000) };
        0
    });
    // Home, so that there is nothing for the child.
    assert!(is_marked(&map, 7));
    for round in 0..5 {
        other.fill(round);
        let since = Instant::now();
        send(&hmm, other.range(), &device);
        other.check(round);
        let took = since.elapsed();
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
    // SAFETY: this test's own child.
    unsafe { libc::kill(child, libc::SIGKILL) };
    assert_eq!(wait(child), -libc::SIGKILL);
    assert!(is_marked(&map, 7));
    drop((map, other));
    end(hmm, &device);
}

/// The page was at home at the fork, so the child has it still when the parent's has
/// left: the only one there is.
#[test]
fn a_gigabyte_that_a_child_shares_is_waited_for() {
    let _pool = gigabytes!(1);
    let _dog = watchdog("a_gigabyte_that_a_child_shares_is_waited_for", 120);
    let (hmm, device) = engine(ONE);
    let map = gigantic(1);
    mark(&map, 11);
    send(&hmm, map.range(), &device);
    assert!(is_marked(&map, 11));
    let child = fork(|| {
        if !is_there(&map) {
            return NOT_COPIED;
        }
        // SAFETY: only sleeps.
        unsafe { libc::sleep(2) };
        i32::from(!is_marked(&map, 11))
    });
    send(&hmm, map.range(), &device);
    assert!(is_marked(&map, 11));
    mark(&map, 12);
    let status = wait(child);
    assert!(is_marked(&map, 12));
    drop(map);
    end(hmm, &device);
    if status == NOT_COPIED {
        skip!("this kernel's fork has not copied the page (see docs/kernel-notes.md)");
    }
    assert_eq!(status, 0);
}

/// What a child says that has no page.
const NOT_COPIED: i32 = 77;

/// Whether the first page is in the page table. Allocates nothing.
fn is_there(map: &Map) -> bool {
    let mut word = 0u64;
    let at = i64::try_from(map.at().addr() / common::PAGE * 8).unwrap();
    // SAFETY: reads eight bytes into a word of this function's own.
    unsafe {
        let fd = libc::open(c"/proc/self/pagemap".as_ptr(), libc::O_RDONLY);
        libc::pread(fd, (&raw mut word).cast(), 8, at);
        libc::close(fd);
    }
    word >> 63 != 0
}

/// The kernel has no page to put the data into: it stays where it is, who touches it
/// waits, and has it as soon as there is one.
#[test]
fn an_empty_pool_of_gigabytes_loses_nothing() {
    let pool = gigabytes!(1);
    let _dog = watchdog("an_empty_pool_of_gigabytes_loses_nothing", 120);
    let (hmm, device) = engine(ONE);
    let map = gigantic_with(1, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    mark(&map, 9);
    send(&hmm, map.range(), &device);
    assert_eq!(pool.set(0).unwrap(), 0);
    let report = hmm.evict(map.range()).unwrap();
    adds_up(&report, map.range());
    assert_eq!(report.stayed_pages, map.range().pages(), "{report}");
    assert_eq!(report.stayed[0].reason, StayReason::NoSystemMemory);
    assert_eq!(on_device(&hmm, map.range(), &device), GIGABYTE as u64);
    let done = AtomicBool::new(false);
    let mut back = Ok(1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(is_marked(&map, 9));
            done.store(true, Ordering::Release);
        });
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!done.load(Ordering::Acquire), "there is no page for it");
        // Meanwhile its neighbours are served.
        let other = Map::new(64);
        other.fill(1);
        let reports = hmm.migrate(other.range(), device.id());
        other.check(1);
        drop((other, reports));
        back = pool.set(1);
        if !matches!(back, Ok(1)) {
            // Or the thread would wait for ever.
            println!("the kernel has no gigabyte any more: {back:?}");
            std::process::exit(1);
        }
    });
    assert!(done.load(Ordering::Acquire));
    drop(map);
    end(hmm, &device);
}

#[test]
fn a_device_makes_room_for_a_gigabyte() {
    let _pool = gigabytes!(2);
    let _dog = watchdog("a_device_makes_room_for_a_gigabyte", 120);
    let (hmm, first) = engine(ONE);
    let second = device(&hmm, ONE);
    let (map, small) = (gigantic(2), Map::new(40 * HUGE));
    mark(&map, 10);
    small.fill(10);
    send(&hmm, small.range(), &first);
    send(&hmm, map.part(0, GIGABYTE), &first);
    assert!(on_device(&hmm, small.range(), &first) <= 16 * HUGE as u64);
    send(&hmm, map.part(GIGABYTE, GIGABYTE), &first);
    assert_eq!(on_device(&hmm, map.range(), &first), GIGABYTE as u64);
    // And small ones for which a gigabyte goes.
    send(&hmm, small.range(), &first);
    assert_eq!(on_device(&hmm, map.range(), &first), 0);
    send(&hmm, map.part(0, GIGABYTE), &first);
    send(&hmm, map.part(0, GIGABYTE), &second);
    assert_eq!(on_device(&hmm, map.range(), &second), GIGABYTE as u64);
    assert!(is_marked(&map, 10));
    small.check(10);
    all_free(&hmm, &second);
    drop((map, small));
    end(hmm, &first);
}

/// A device that is too small uses it in place, and evicts nothing for it.
#[test]
fn a_small_device_uses_a_gigabyte_in_place() {
    let _pool = gigabytes!(1);
    let _dog = watchdog("a_small_device_uses_a_gigabyte_in_place", 60);
    let (hmm, device) = engine(16);
    let (map, small) = (gigantic(1), Map::new(64));
    small.fill(14);
    send(&hmm, small.range(), &device);
    map.fill_part(1000, 10, 14);
    let report = hmm.migrate(map.part(1000, 10), device.id()).unwrap();
    assert_eq!(
        report.stayed[0].reason,
        StayReason::NoDeviceMemory,
        "{report}"
    );
    add_by_device(&device, &map, 1000 * WORDS, 5);
    add_by_device(&device, &map, 200_000 * WORDS, 5);
    assert_eq!(map.get(1000 * WORDS), common::pattern(14, 1000 * WORDS) + 5);
    assert_eq!(map.get(200_000 * WORDS), 5);
    assert_eq!(on_device(&hmm, small.range(), &device), 64);
    let entries = hmm.snapshot(map.part(1000, 10)).unwrap();
    assert!(
        entries
            .iter()
            .all(|entry| matches!(entry, MirrorEntry::System { gigantic: true, .. })),
        "{:?}",
        entries[0]
    );
    drop((map, small));
    end(hmm, &device);
}

/// What others may have as well stays.
#[test]
fn a_shared_gigabyte_stays() {
    let _pool = gigabytes!(1);
    let _dog = watchdog("a_shared_gigabyte_stays", 60);
    let (hmm, device) = engine(ONE);
    let map = gigantic_with(1, libc::MAP_SHARED);
    map.set(5, 6);
    let report = hmm.migrate(map.part(0, 10), device.id()).unwrap();
    assert_eq!(report.stayed[0].reason, StayReason::HugeTlb, "{report}");
    drop(map);
    end(hmm, &device);
}

/// The data is lost with its device: touching it is a SIGBUS.
#[test]
fn a_lost_device_loses_the_gigabyte() {
    let name = "a_lost_device_loses_the_gigabyte";
    let _pool = match role() {
        Some(_) => None,
        None => Some(gigabytes!(1)),
    };
    let _dog = watchdog("a_lost_device_loses_the_gigabyte", 120);
    if role().is_none() {
        let (hmm, _) = engine(1);
        let expected = signal_of_lost_data(&hmm);
        hmm.shutdown().unwrap();
        let (status, text) = run(helper(name, "touches"), 60);
        let status = status.expect("the helper ends");
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(expected), "{status}: {text}");
        return;
    }
    let (hmm, device) = engine(ONE);
    let map = gigantic(1);
    mark(&map, 16);
    send(&hmm, map.range(), &device);
    device.injector().lose(LossMode::MemoryGone);
    let part = map.part(100, 1);
    adds_up(&hmm.evict(part).unwrap(), part);
    println!("read {}", map.get(5));
}

/// With what older kernels have.
#[test]
fn older_kernels_move_gigabytes_as_well() {
    let _pool = gigabytes!(2);
    let _dog = watchdog("older_kernels_move_gigabytes_as_well", 120);
    let disable = Disable {
        move_pages: true,
        pagemap_scan: true,
        procmap_query: true,
        ..Disable::default()
    };
    let (hmm, device) = engine_of(Hmm::builder().disable(disable), ONE);
    let map = gigantic(1);
    mark(&map, 13);
    let report = send(&hmm, map.range(), &device);
    assert_eq!(report.moved.get(), map.pages() as u64, "{report}");
    let child = fork(|| i32::from(!is_marked(&map, 13)));
    assert_eq!(wait(child), 0);
    assert!(is_marked(&map, 13));
    send(&hmm, map.range(), &device);
    assert!(map.advise(0, GIGABYTE, libc::MADV_DONTNEED));
    map.check_zero(5000, 3000);
    drop(map);
    end(hmm, &device);
}

/// How long a gigabyte takes, and a copy of one; shown by `--nocapture`.
#[test]
fn a_gigabyte_moves_about_as_fast_as_it_is_copied() {
    let _pool = gigabytes!(2);
    let _dog = watchdog("a_gigabyte_moves_about_as_fast_as_it_is_copied", 120);
    let (hmm, device) = engine(ONE);
    let map = gigantic(2);
    map.fill(1);
    let rate = |since: Instant| 1.074 / since.elapsed().as_secs_f64();
    let (mut copied, mut out, mut home) = (0f64, 0f64, 0f64);
    for _ in 0..4 {
        let since = Instant::now();
        // SAFETY: both lie in this test's own mapping, and do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(map.page(0), map.page(GIGABYTE), 1 << 30);
        }
        copied = copied.max(rate(since));
        let since = Instant::now();
        send(&hmm, map.part(0, GIGABYTE), &device);
        out = out.max(rate(since));
        let since = Instant::now();
        assert_eq!(map.get(0), common::pattern(1, 0));
        home = home.max(rate(since));
    }
    println!("memcpy {copied:.2} GB/s, to the device {out:.2} GB/s, home {home:.2} GB/s");
    drop(map);
    end(hmm, &device);
}
