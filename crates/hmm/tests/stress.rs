//! Many threads, several devices, all that a program does to its memory, at once and
//! for a minute, against an oracle. Each region has an owner who knows what must
//! be in it; movers shuffle all regions around meanwhile.
//!
//! `HMM_STRESS_SECONDS` sets the time, `HMM_TEST_SEED` the seed (which is
//! printed; threads interleave as they like, so it is a hint, not a replay).
//! `HMM_STRESS_WITHOUT=mremap,fork,...` leaves parts out, to narrow a failure
//! down.

#![allow(
    clippy::needless_range_loop,
    clippy::cast_possible_truncation,
    reason = "page numbers name pages in messages; counters are small"
)]
mod common;

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::either::{add_vulkan, program, push};
use common::{
    AnyDevice, Device, HUGE, Kind, Map, Operation, PAGE, Rng, WORDS, Work, all_free, fork,
    nothing_staged, pattern, wait, watchdog,
};
use hmm::{
    ByteCount, Demand, Error, Hmm, PageCount, PageRange, Program, ProgramOptions, VirtAddr,
    VulkanDevice, VulkanOptions,
};

/// Increments the values of a list: not to be done twice.
const WALK: &[u8] = include_bytes!("kernels/walk_write.spv");
/// Writes twice.
const TWICE: &[u8] = include_bytes!("kernels/twice.spv");

/// Pages of each owner's region.
const REGION: usize = 700;
/// Counters that CPUs and devices count up together, spread over some pages.
const COUNTERS: usize = 512;
const COUNTER_PAGES: usize = 64;

/// What all threads share.
struct Field {
    hmm: Hmm,
    /// Several can be ways to use one.
    devices: Vec<Device>,
    vulkan: Option<VulkanDevice>,
    stop: AtomicBool,
    /// Where each region is now: address and pages. A hint for movers.
    regions: Mutex<Vec<(usize, usize)>>,
    without: String,
}

impl Field {
    /// Less device memory than there is data: evictions all the time.
    fn open() -> Self {
        let (hmm, first) = common::engine(12);
        let second = common::device(&hmm, 6);
        Self::of(hmm, vec![first.into(), second.into()], None)
    }

    /// The same, where one of them is a Vulkan device.
    fn with_vulkan() -> Result<Self, String> {
        let (hmm, first) = common::engine(8);
        let options = VulkanOptions::new(ByteCount::mib(10)).poison_freed(true);
        let vulkan = add_vulkan(&hmm, options)?;
        let ways = [Kind::Vulkan, Kind::Waiting, Kind::Named];
        let ways = ways.map(|kind| Device::vulkan(kind, vulkan));
        let devices = std::iter::once(first.into()).chain(ways).collect();
        Ok(Self::of(hmm, devices, Some(vulkan)))
    }

    fn of(hmm: Hmm, devices: Vec<Device>, vulkan: Option<VulkanDevice>) -> Self {
        Self {
            hmm,
            devices,
            vulkan,
            stop: AtomicBool::new(false),
            regions: Mutex::new(Vec::new()),
            without: std::env::var("HMM_STRESS_WITHOUT").unwrap_or_default(),
        }
    }

    /// Does the work on a device; false when that could not have all of it at one time,
    /// and nothing was done.
    fn run(&self, number: usize, work: Work) -> bool {
        match self.devices[number].run(work) {
            Ok(()) => true,
            Err(error) => {
                let named = self.devices[number].kind() == Kind::Named;
                assert!(named && error.is("Thrash"), "{}: {error}", error.parts);
                false
            }
        }
    }

    /// Fills pages with a pattern, by whatever can do that.
    fn fill(&self, rng: &mut Rng, map: &Map, first: usize, pages: usize, seed: u64) {
        let number = rng.below(2 * self.devices.len());
        let word = first * WORDS;
        let work = Work::new(Operation::Fill, map.word(word)).count(pages * WORDS);
        let by_cpu = number >= self.devices.len() || self.leaves_out("kernels");
        if by_cpu || !self.run(number, work.first(word).value(seed)) {
            map.fill_part(first, pages, seed);
        }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn leaves_out(&self, what: &str) -> bool {
        self.without.split(',').any(|part| part == what)
    }

    fn enter(&self, map: &Map) -> usize {
        let mut regions = self.regions.lock().unwrap();
        regions.push((map.at() as usize, map.pages()));
        regions.len() - 1
    }

    fn moved(&self, slot: usize, map: &Map) {
        self.regions.lock().unwrap()[slot] = (map.at() as usize, map.pages());
    }

    fn pick(&self, rng: &mut Rng) -> PageRange {
        let (at, pages) = {
            let regions = self.regions.lock().unwrap();
            regions[rng.below(regions.len())]
        };
        let first = rng.below(pages);
        let most = [1, 16, 64, pages][rng.below(4)];
        let count = 1 + rng.below((pages - first).min(most));
        PageRange::from_pages(
            VirtAddr::new((at + first * PAGE) as u64),
            PageCount::new(count as u64),
        )
    }
}

/// Moves random parts of random regions.
fn mover(field: &Field, seed: u64) -> String {
    let mut rng = Rng::new(seed);
    let (mut calls, mut moved, mut stayed) = (0u64, 0u64, 0u64);
    while field.goes_on() {
        let range = field.pick(&mut rng);
        let device = field.devices[rng.below(field.devices.len())].id();
        let result = match rng.below(10) {
            0..=4 => field.hmm.migrate(range, device),
            5 | 6 => field.hmm.evict(range),
            7 if !field.leaves_out("exclusive") => field.hmm.exclusive(range, device),
            _ => match field.hmm.prefetch(range, device) {
                // Some are waited for, some left to themselves.
                Ok(prefetch) if rng.below(2) == 0 => Ok(prefetch.wait()),
                Ok(_) => continue,
                Err(error) => Err(error),
            },
        };
        match result {
            Ok(report) => {
                common::adds_up(&report, range);
                moved += report.moved.get();
                stayed += report.stayed_pages.get();
            }
            Err(Error::NotMapped { .. } | Error::QueueFull { .. } | Error::NotInPlace { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        calls += 1;
    }
    format!("mover: {calls} calls, {moved} pages moved, {stayed} stayed")
}

/// Counts with the CPU; its share of the sum.
fn counter(field: &Field, counters: &Map, seed: u64, shares: &[AtomicU64]) -> String {
    let mut rng = Rng::new(seed);
    let mut count = 0u64;
    while field.goes_on() {
        for _ in 0..100 {
            let index = rng.below(COUNTERS);
            let word = counters.word(place(index));
            // SAFETY: only accessed atomically, by everyone.
            unsafe { AtomicU64::from_ptr(word) }.fetch_add(1, Ordering::Relaxed);
            shares[index].fetch_add(1, Ordering::Relaxed);
            count += 1;
        }
    }
    format!("CPU counter: {count} counted")
}

fn place(index: usize) -> usize {
    (index % COUNTER_PAGES) * WORDS + index / COUNTER_PAGES
}

/// Counts with device kernels: a counter of each page at a time.
fn device_counter(field: &Field, counters: &Map, number: usize, shares: &[AtomicU64]) -> String {
    let (mut launches, mut undone) = (0u64, 0u64);
    while field.goes_on() {
        let turn = launches as usize % (COUNTERS / COUNTER_PAGES);
        let each = 1 + launches % 7;
        let index = turn * COUNTER_PAGES;
        let work = Work::new(Operation::Add, counters.word(place(index))).pages(COUNTER_PAGES);
        if field.run(number, work.times(2).value(each)) {
            for index in index..index + COUNTER_PAGES {
                shares[index].fetch_add(2 * each, Ordering::Relaxed);
            }
        } else {
            undone += 1;
        }
        launches += 1;
    }
    let kind = field.devices[number].kind();
    format!("device counter {number} ({kind:?}): {launches} launches, {undone} undone")
}

/// Writes and checks a region of its own with the CPU.
fn keeper(field: &Field, seed: u64, huge: bool) -> String {
    let mut rng = Rng::new(seed);
    let map = if huge {
        Map::aligned(2 * HUGE, true)
    } else {
        Map::new(REGION)
    };
    let mut generations = vec![0u64; map.pages()];
    map.fill(0);
    field.enter(&map);
    let mut checks = 0u64;
    while field.goes_on() {
        let page = rng.below(map.pages());
        let count = (1 + rng.below(8)).min(map.pages() - page);
        for page in page..page + count {
            check(&map, page, generations[page], "keeper");
            checks += 1;
            if rng.below(2) == 0 {
                generations[page] = rng.next();
                field.fill(&mut rng, &map, page, 1, generations[page]);
            }
        }
    }
    for page in 0..map.pages() {
        check(&map, page, generations[page], "keeper at the end");
    }
    finish(field, &map);
    format!("keeper: {checks} pages checked")
}

fn check(map: &Map, page: usize, generation: u64, who: &str) {
    if let Some(word) = map.wrong(page, 1, generation) {
        let seen = map.get(word);
        let wrong = (page * WORDS..(page + 1) * WORDS)
            .filter(|&index| map.get(index) != pattern(generation, index))
            .count();
        panic!(
            "LOST DATA ({who}): page {page} at {:#x}, word {}: {seen:#x} instead of {:#x}; now \
             {wrong} words of the page are wrong",
            map.page(page) as usize,
            word % WORDS,
            pattern(generation, word),
        );
    }
}

fn finish(field: &Field, map: &Map) {
    let report = field.hmm.evict(map.range()).unwrap();
    common::adds_up(&report, map.range());
}

/// A region that only a device writes and reads.
fn device_keeper(field: &Field, number: usize, seed: u64) -> String {
    const SOME: usize = 64;
    let mut rng = Rng::new(seed);
    // What the kernel compares with is beside it, and moves as well.
    let (map, old) = (Map::new(REGION), Map::new(1));
    field.enter(&map);
    field.enter(&old);
    let mut generations = vec![0u64; REGION];
    let (mut launches, mut undone) = (0u64, 0u64);
    map.fill(0);
    while field.goes_on() {
        let start = rng.below(REGION - SOME);
        let new = rng.next();
        old.set(0, 0);
        for (word, &generation) in (1..).zip(&generations[start..start + SOME]) {
            old.set(word, generation);
        }
        let index = start * WORDS;
        let work = Work::new(Operation::Replace, map.word(index)).count(SOME * WORDS);
        launches += 1;
        if !field.run(number, work.first(index).other(old.word(0)).value(new)) {
            undone += 1;
            continue;
        }
        let lost = old.get(0);
        assert_eq!(lost, 0, "LOST DATA (device): word {}", lost.wrapping_sub(1));
        generations[start..start + SOME].fill(new);
        if rng.below(8) == 0 {
            let page = rng.below(REGION);
            check(&map, page, generations[page], "device keeper");
        }
    }
    for (page, &generation) in generations.iter().enumerate() {
        check(&map, page, generation, "device keeper at the end");
    }
    finish(field, &map);
    finish(field, &old);
    let kind = field.devices[number].kind();
    format!("device keeper {number} ({kind:?}): {launches} launches, {undone} undone")
}

/// The push constants and the program are the only things that a launch needs.
fn launch(device: VulkanDevice, program: &Program, groups: usize, words: &[u64]) {
    let groups = [u32::try_from(groups).expect("few enough"), 1, 1];
    let launched = device.launch(program, groups, &push(program, words));
    launched.unwrap_or_else(|error| panic!("{error}"));
}

/// Lists through a region, whose values a kernel increments as it walks: it has written
/// when it misses the next page.
fn walker(field: &Field, device: VulkanDevice, seed: u64) -> String {
    const CHAINS: usize = 80;
    let mut rng = Rng::new(seed);
    let (map, heads) = (Map::new(REGION), Map::new(1));
    let program = program(&device, WALK, ProgramOptions::default());
    for page in 0..REGION {
        let next = page + CHAINS;
        let next = (next < REGION).then(|| map.page(next).expose_provenance() as u64);
        map.set(page * WORDS, next.unwrap_or(0));
    }
    for chain in 0..CHAINS {
        heads.set(chain, map.page(chain).expose_provenance() as u64);
    }
    field.enter(&map);
    field.enter(&heads);
    let mut launches = 0;
    while field.goes_on() {
        let words = [heads.word(0).addr() as u64, CHAINS as u64];
        launch(device, &program, CHAINS.div_ceil(64), &words);
        launches += 1;
        let page = rng.below(REGION);
        assert_eq!(
            map.get(page * WORDS + 1),
            launches,
            "LOST DATA: page {page}"
        );
    }
    for page in 0..REGION {
        assert_eq!(
            map.get(page * WORDS + 1),
            launches,
            "LOST DATA: page {page}"
        );
    }
    finish(field, &map);
    finish(field, &heads);
    format!("walker ({:?}): {launches} launches", program.on_demand())
}

/// Words that a kernel writes in two places: again from the start when it misses one.
fn repeater(field: &Field, device: VulkanDevice, seed: u64) -> String {
    const SOME: usize = 40;
    let mut rng = Rng::new(seed);
    let maps = [Map::new(REGION), Map::new(REGION)];
    let options = ProgramOptions {
        idempotent: true,
        demand: Demand::Repeat,
        ..ProgramOptions::default()
    };
    let program = program(&device, TWICE, options);
    for map in &maps {
        field.enter(map);
    }
    // What each page was given: value and number of its first word.
    let mut values = vec![(0u64, 0u64); REGION];
    let check = |page: usize, (value, first): (u64, u64)| {
        for word in 0..WORDS {
            let i = if value == 0 { 0 } else { first + word as u64 };
            let seen = maps.each_ref().map(|map| map.get(page * WORDS + word));
            let expected = [value.wrapping_add(i), value.wrapping_sub(i)];
            assert_eq!(
                seen, expected,
                "LOST DATA (repeater): page {page} word {word}"
            );
        }
    };
    let mut launches = 0u64;
    while field.goes_on() {
        let (start, value) = (rng.below(REGION - SOME), 1 | rng.next());
        let words = SOME * WORDS;
        let [first, second] = maps.each_ref().map(|map| map.word(start * WORDS));
        let arguments = [
            first.addr() as u64,
            second.addr() as u64,
            words as u64,
            value,
        ];
        launch(device, &program, words / 64, &arguments);
        for page in 0..SOME {
            values[start + page] = (value, (page * WORDS) as u64);
        }
        launches += 1;
        let page = rng.below(REGION);
        check(page, values[page]);
    }
    (0..REGION).for_each(|page| check(page, values[page]));
    maps.iter().for_each(|map| finish(field, map));
    format!("repeater ({:?}): {launches} launches", program.on_demand())
}

/// What a page of a shifting region holds.
#[derive(Clone, Copy, PartialEq)]
enum Content {
    Zeros,
    Pattern(u64),
}

/// Unmaps, maps, drops and remaps its own region all the time.
fn shifter(field: &Field, seed: u64, huge: bool) -> String {
    let mut rng = Rng::new(seed);
    let mut map = if huge {
        Map::aligned(HUGE * 2, true)
    } else {
        Map::new(REGION)
    };
    let pages = map.pages();
    // The word index changes with the page only: patterns move with the data.
    let mut contents = vec![Content::Zeros; pages];
    let slot = field.enter(&map);
    let (mut rounds, mut remaps, mut refused) = (0u64, 0u64, 0u64);
    // One mapping, as far as the program is concerned.
    let mut whole = true;
    let look = |map: &Map, contents: &[Content], page: usize, what: &str| match contents[page] {
        Content::Zeros => {
            if let Some(word) = map.not_zero(page, 1) {
                panic!(
                    "LOST DATA (shifter, after {what}): page {page} word {}: {:#x} instead of 0",
                    word % WORDS,
                    map.get(word)
                );
            }
        }
        Content::Pattern(seed) => check(map, page, seed, what),
    };
    let mut what = "start";
    while field.goes_on() {
        rounds += 1;
        let first = rng.below(pages);
        let most = [4, 64, pages][rng.below(3)];
        let count = 1 + rng.below((pages - first).min(most));
        match rng.below(16) {
            0..=6 => {
                let count = count.min(16);
                for (page, content) in (first..).zip(&mut contents[first..first + count]) {
                    let seed = rng.next();
                    field.fill(&mut rng, &map, page, 1, seed);
                    *content = Content::Pattern(seed);
                }
            }
            7..=9 if !field.leaves_out("dontneed") => {
                what = "DONTNEED";
                assert!(map.advise(first, count, libc::MADV_DONTNEED));
                contents[first..first + count].fill(Content::Zeros);
            }
            10 | 11 if !field.leaves_out("munmap") => {
                what = "munmap and mmap";
                // Over it, without a moment in which others could map there.
                map_anew(&map, first, count);
                contents[first..first + count].fill(Content::Zeros);
                whole = false;
            }
            12 | 13 if !field.leaves_out("mremap") && !whole => {
                // Several mappings: the kernel might move the first of them,
                // and then refuse the others.
                rebuild(&map, &mut contents, &mut rng);
                whole = true;
                what = "a new start";
            }
            12 | 13 if !field.leaves_out("mremap") => {
                if let Some(moved) = elsewhere(&map) {
                    map.leak();
                    map = moved;
                    remaps += 1;
                    what = "mremap";
                } else {
                    map.leak();
                    map = Map::new(pages);
                    contents.fill(Content::Zeros);
                    refused += 1;
                    what = "a refused mremap";
                }
                field.moved(slot, &map);
            }
            _ => {}
        }
        for _ in 0..8 {
            look(&map, &contents, rng.below(pages), what);
        }
        if rounds.is_multiple_of(64) {
            (0..pages).for_each(|page| look(&map, &contents, page, what));
        }
    }
    (0..pages).for_each(|page| look(&map, &contents, page, "the end"));
    finish(field, &map);
    // The engine may be about to register what was there before.
    assert!(
        refused <= 2 + remaps / 50,
        "{refused} of {remaps} remaps refused: registering splits mappings"
    );
    format!("shifter: {rounds} rounds, {remaps} remaps, {refused} refused")
}

/// Moves a mapping to an address that may have been another one's a moment ago.
/// `None` when the kernel refuses; then some of it may have moved, and others
/// may be where that was, so nothing of it is to be used again.
fn elsewhere(map: &Map) -> Option<Map> {
    // SAFETY: the caller's own region, and nobody else uses it.
    let new = unsafe {
        let reserved = libc::mmap(
            std::ptr::null_mut(),
            map.bytes(),
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert_ne!(reserved, libc::MAP_FAILED);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        libc::mremap(map.at().cast(), map.bytes(), map.bytes(), flags, reserved)
    };
    (new != libc::MAP_FAILED).then(|| Map::adopt(new.cast(), map.pages()))
}

fn map_anew(map: &Map, first: usize, count: usize) {
    // SAFETY: this thread's own region, and nobody else uses it.
    let got = unsafe {
        libc::mmap(
            map.page(first).cast(),
            count * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    assert_eq!(got, map.page(first).cast());
}

/// One mapping again, with new content.
fn rebuild(map: &Map, contents: &mut [Content], rng: &mut Rng) {
    map_anew(map, 0, map.pages());
    contents.fill(Content::Zeros);
    for _ in 0..32 {
        let page = rng.below(map.pages());
        let seed = rng.next();
        map.fill_part(page, 1, seed);
        contents[page] = Content::Pattern(seed);
    }
}

/// Says what a forked child found, with nothing that another thread of its parent
/// may have held when it forked.
fn tell(map: &Map, index: usize, generation: u64) {
    let mut line = [0; 200];
    let mut rest = &mut line[..];
    let page = index / WORDS;
    let words = page * WORDS..(page + 1) * WORDS;
    let wrong = words.filter(|&word| map.get(word) != pattern(generation, word));
    let _ = writeln!(
        rest,
        "child {}: page {page} at {:p}, {} words wrong, first word {index}: {:#x} instead of {:#x}",
        std::process::id(),
        map.page(page),
        wrong.count(),
        map.get(index),
        pattern(generation, index)
    );
    let len = 200 - rest.len();
    // SAFETY: so many bytes of the line were filled.
    unsafe { libc::write(2, line.as_ptr().cast(), len) };
}

/// Forks, and changes its region while the child checks what it has of it.
fn forker(field: &Field, seed: u64) -> String {
    let mut rng = Rng::new(seed);
    let map = Map::new(REGION);
    field.enter(&map);
    let mut generation = 1;
    map.fill(generation);
    let mut forks = 0u64;
    while field.goes_on() {
        if field.leaves_out("fork") {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        let grandchild = rng.below(4) == 0;
        let own = rng.below(REGION);
        let child = fork(|| {
            if map.wrong(0, REGION / 2, generation).is_some() {
                return 1;
            }
            map.fill_part(own, 1, !generation);
            if grandchild {
                // SAFETY: the grandchild only touches memory.
                let pid = unsafe { libc::fork() };
                if pid == 0 {
                    let mine = map.wrong(own, 1, !generation).is_some();
                    let wrong = (0..REGION)
                        .any(|page| page != own && map.wrong(page, 1, generation).is_some());
                    // SAFETY: ends the grandchild.
                    unsafe { libc::_exit(i32::from(mine) + 2 * i32::from(wrong)) };
                }
                let mut status = 0;
                // SAFETY: its own child.
                unsafe { libc::waitpid(pid, &raw mut status, 0) };
                if status != 0 {
                    return 10 + libc::WEXITSTATUS(status);
                }
            }
            let mut rest = false;
            for page in (0..REGION).filter(|&page| page != own) {
                if let Some(index) = map.wrong(page, 1, generation) {
                    tell(&map, index, generation);
                    rest = true;
                }
            }
            2 * i32::from(rest) + 4 * i32::from(map.wrong(own, 1, !generation).is_some())
        });
        let before = std::mem::replace(&mut generation, rng.next());
        for page in (0..REGION).step_by(50) {
            field.fill(&mut rng, &map, page, 50.min(REGION - page), generation);
        }
        let status = wait(child);
        assert_eq!(
            status, 0,
            "LOST DATA in a child (fork {forks}, grandchild: {grandchild}, its own page {own}, \
             pattern {before:#x}, its parent's since then {generation:#x})"
        );
        for page in 0..REGION {
            check(&map, page, generation, "forker");
        }
        forks += 1;
        std::thread::sleep(Duration::from_millis(rng.below(30) as u64));
    }
    finish(field, &map);
    format!("forker: {forks} forks")
}

#[test]
fn stress_many_threads_against_an_oracle() {
    let seconds = seconds();
    let _dog = watchdog("stress_many_threads_against_an_oracle", seconds + 60);
    storm(Field::open(), seconds);
}

/// The same with a Vulkan device: kernels that begin again, wait, or have all that they
/// use named, on memory that others write, fork, remap and drop.
#[test]
fn stress_with_a_vulkan_device() {
    let seconds = seconds();
    let _dog = watchdog("stress_with_a_vulkan_device", seconds + 60);
    storm(or_skip!(Field::with_vulkan()), seconds);
}

fn seconds() -> u64 {
    let seconds = std::env::var("HMM_STRESS_SECONDS").ok();
    seconds.and_then(|text| text.parse().ok()).unwrap_or(60)
}

fn storm(field: Field, seconds: u64) {
    let seed = common::seed();
    println!("seed {seed}");
    let counters = Map::new(COUNTER_PAGES);
    field.enter(&counters);
    let shares: Vec<AtomicU64> = (0..COUNTERS).map(|_| AtomicU64::new(0)).collect();
    let done = std::thread::scope(|scope| {
        let (field, counters, shares) = (&field, &counters, &shares[..]);
        let mut threads = vec![
            scope.spawn(move || counter(field, counters, seed ^ 1, shares)),
            scope.spawn(move || keeper(field, seed ^ 4, false)),
            scope.spawn(move || keeper(field, seed ^ 5, true)),
            scope.spawn(move || shifter(field, seed ^ 8, false)),
            scope.spawn(move || shifter(field, seed ^ 9, true)),
            scope.spawn(move || forker(field, seed ^ 10)),
            scope.spawn(move || mover(field, seed ^ 11)),
            scope.spawn(move || mover(field, seed ^ 12)),
        ];
        let kernels = !field.leaves_out("kernels");
        for number in (0..field.devices.len()).filter(|_| kernels) {
            let seed = seed ^ (20 + number as u64);
            threads.push(scope.spawn(move || device_counter(field, counters, number, shares)));
            threads.push(scope.spawn(move || device_keeper(field, number, seed)));
        }
        if let Some(device) = field.vulkan.filter(|_| kernels) {
            threads.push(scope.spawn(move || walker(field, device, seed ^ 13)));
            threads.push(scope.spawn(move || repeater(field, device, seed ^ 14)));
        }
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end && !threads.iter().any(|thread| thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
        }
        field.stop.store(true, Ordering::Relaxed);
        let ends: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        ends.into_iter()
            .map(|end| end.expect("a thread found an error, see above"))
            .collect::<Vec<_>>()
    });
    done.iter().for_each(|line| println!("{line}"));
    for (index, share) in shares.iter().enumerate() {
        let expected = share.load(Ordering::Relaxed);
        assert_eq!(
            counters.get(place(index)),
            expected,
            "counter {index} lost counts"
        );
    }
    finish(&field, &counters);
    drop(counters);
    let statistics = field.hmm.statistics();
    println!("{statistics:#?}");
    if let Some(device) = field.vulkan {
        println!("{:#?}", device.stats());
    }
    // Nobody calls MADV_FREE here: a page that is missing in staging is lost data.
    assert_eq!(statistics.freed_in_staging, 0);
    // Home after this: what movers took along by names that were out of date,
    // and what a refused mremap has left behind.
    let mut removed = Vec::new();
    for device in &field.devices {
        if !removed.contains(&device.id()) {
            assert!(
                device.remove().unwrap(),
                "{} did not let go of everything",
                device.name()
            );
            removed.push(device.id());
        }
    }
    nothing_staged(&field.hmm);
    field.hmm.shutdown().unwrap();
}

/// One that forks and two that move: the parent loses nothing, nor do children.
#[test]
fn a_forking_process_keeps_its_data() {
    let _dog = watchdog("a_forking_process_keeps_its_data", 60);
    let seed = common::seed();
    println!("seed {seed}");
    let field = Field::open();
    let first = Map::new(1);
    field.enter(&first);
    std::thread::scope(|scope| {
        let field = &field;
        let mut threads: Vec<_> = (11..13)
            .map(|number| scope.spawn(move || mover(field, seed ^ number)))
            .collect();
        threads.extend((1..3).map(|number| scope.spawn(move || forker(field, seed ^ number))));
        let end = Instant::now() + Duration::from_secs(8);
        while Instant::now() < end && !threads.iter().any(|thread| thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
        }
        field.stop.store(true, Ordering::Relaxed);
        for thread in threads {
            println!(
                "{}",
                thread.join().expect("a thread found an error, see above")
            );
        }
    });
    field.hmm.shutdown().unwrap();
}

/// With a region to itself, nothing of a device's memory is ever lost.
#[test]
fn device_memory_is_whole_after_a_storm() {
    let _dog = watchdog("device_memory_is_whole_after_a_storm", 60);
    let (hmm, device) = common::engine(8);
    let map = Map::new(3000);
    map.fill(1);
    let end = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        let (hmm, map, device) = (&hmm, &map, &device);
        for number in 0..3 {
            scope.spawn(move || {
                let mut rng = Rng::new(number + 1);
                while Instant::now() < end {
                    let first = rng.below(2900);
                    let range = map.part(first, 1 + rng.below(100));
                    if rng.below(3) == 0 {
                        hmm.evict(range).unwrap();
                    } else {
                        hmm.migrate(range, device.id()).unwrap();
                    }
                    map.check_part(first, 1, 1);
                }
            });
        }
    });
    map.check(1);
    hmm.evict(map.range()).unwrap();
    nothing_staged(&hmm);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}
