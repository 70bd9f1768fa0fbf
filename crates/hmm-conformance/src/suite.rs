//! The items of the suite. Each panics when the device does not show what it has to.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hmm_device::{FailAt, LossMode};
use hmm_hal::{DeviceError, Transfer};
use hmm_types::{Access, ByteCount, FrameRange, PageCount, VirtAddr};

use crate::{Engine, Failure, Mapped, Operation, Setting, Subject};

type Opened = &'static dyn Subject;

/// Words of a page.
const WORDS: usize = 512;

/// How the device is to be for an item of this name.
#[must_use]
pub fn setting_of(name: &str) -> Setting {
    let memory = match name {
        "a_working_set_larger_than_memory_works" => ByteCount::kib(256),
        "full_memory_is_an_error" | "frames_are_handed_out_once" => ByteCount::mib(2),
        _ => ByteCount::mib(8),
    };
    Setting {
        memory,
        poison_freed: true,
    }
}

fn run(subject: Opened, operation: Operation) {
    if let Err(failure) = subject.run(operation) {
        panic!("{operation:?} failed: {failure:?}");
    }
}

/// Ends other threads, also when a test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A cheap source of numbers.
fn random(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1);
    *state >> 33
}

/// Each kernel, against what it should leave behind.
pub fn every_operation_is_right(subject: Opened) {
    let engine = Engine::new(subject, 64);
    let at = |page: usize| engine.address(page * WORDS);
    // One word less than whole pages: the edges matter.
    let count = 8 * WORDS - 1;
    let words = count as u64;
    let first = 1000;
    run(
        subject,
        Operation::Fill {
            to: at(0),
            count: words,
            first,
        },
    );
    run(
        subject,
        Operation::Increment {
            at: at(0),
            count: words,
        },
    );
    run(
        subject,
        Operation::Copy {
            from: at(0),
            to: at(10),
            count: words,
        },
    );
    run(
        subject,
        Operation::Sum {
            from: at(10),
            count: words,
            into: at(20),
        },
    );
    let (from, bins) = (at(10), 7);
    run(
        subject,
        Operation::Histogram {
            from,
            count: words,
            into: at(22),
            bins,
        },
    );
    engine.evict_all();
    let mut sum = 0;
    let mut histogram = [0u64; 7];
    for word in 0..count {
        let value = first + 1 + word as u64;
        assert_eq!(engine.home.read(word), value, "word {word}");
        assert_eq!(
            engine.home.read(10 * WORDS + word),
            value,
            "copy of word {word}"
        );
        sum += value;
        histogram[usize::try_from(value % bins).expect("small")] += 1;
    }
    assert_eq!(engine.home.read(count), 0, "the word behind the last one");
    assert_eq!(engine.home.read(20 * WORDS), sum);
    for (bin, &count) in histogram.iter().enumerate() {
        assert_eq!(engine.home.read(22 * WORDS + bin), count, "bin {bin}");
    }
    chase(subject, engine);
    subject.close();
}

/// Chains that lead from page to page.
fn chase(subject: Opened, engine: &'static Engine) {
    const CHAINS: usize = 5;
    const HOPS: usize = 20;
    // Node `n` is a word of page 30 + n % 30; it leads to node n + CHAINS.
    let node = |n: usize| (30 + n % 30) * WORDS + n;
    for n in 0..CHAINS * (HOPS + 2) {
        let next = engine.address(node(n + CHAINS)).get();
        engine.home.write(node(n), next);
    }
    for chain in 0..CHAINS {
        let start = engine.address(node(chain)).get();
        engine.home.write(60 * WORDS + chain, start);
    }
    let chase = Operation::Chase {
        starts: engine.address(60 * WORDS),
        chains: CHAINS as u64,
        hops: HOPS as u64,
        into: engine.address(62 * WORDS),
    };
    run(subject, chase);
    engine.evict_all();
    for chain in 0..CHAINS {
        let end = engine.address(node(chain + HOPS * CHAINS)).get();
        assert_eq!(engine.home.read(62 * WORDS + chain), end, "chain {chain}");
    }
}

/// Pages come by faults, also if the engine has to be asked again; a page that never
/// comes is an error.
pub fn faults_bring_pages_and_waiting_is_bounded(subject: Opened) {
    let engine = Engine::new(subject, 16);
    engine.retry_every(3);
    let count = 16 * WORDS as u64;
    let to = engine.address(0);
    run(
        subject,
        Operation::Fill {
            to,
            count,
            first: 5,
        },
    );
    assert!(engine.faults.load(Ordering::SeqCst) >= 16);
    assert!(engine.waits.load(Ordering::SeqCst) > 0, "nobody waited");
    engine.evict_all();
    assert!((0..16 * WORDS).all(|word| engine.home.read(word) == 5 + word as u64));
    engine.retry_every(1);
    let failed = subject.run(Operation::Increment { at: to, count: 1 });
    assert_eq!(failed, Err(Failure::Stuck(to)));
    assert_eq!(engine.home.read(0), 5);
    subject.close();
}

/// Increments while others take pages away: none is lost, none is done twice.
pub fn data_survives_while_pages_come_and_go(subject: Opened) {
    const PAGES: usize = 48;
    const EVICTIONS: u64 = 400;
    let engine = Engine::new(subject, PAGES);
    engine.retry_every(17);
    let ended = AtomicBool::new(false);
    let at = engine.address(0);
    let count = (PAGES * WORDS) as u64;
    let evictions = AtomicU64::new(0);
    let rounds = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut state = 1;
            while !ended.load(Ordering::SeqCst) {
                let page = usize::try_from(random(&mut state)).expect("64 bits") % PAGES;
                evictions.fetch_add(u64::from(engine.evict(page)), Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let _ended = Ends(&ended);
        let mut rounds = 0u64;
        while evictions.load(Ordering::SeqCst) < EVICTIONS {
            run(subject, Operation::Increment { at, count });
            rounds += 1;
        }
        rounds
    });
    assert!(rounds > 0);
    engine.evict_all();
    for word in 0..PAGES * WORDS {
        assert_eq!(engine.home.read(word), rounds, "word {word}");
    }
    subject.close();
}

/// When unmap has returned, or another frame was mapped in its place, a frame is nobody's
/// but the engine's.
pub fn nothing_is_written_after_unmap(subject: Opened) {
    const PATTERN: u64 = 0x5EED_5EED_5EED_5EED;
    let engine = Engine::new(subject, 1);
    let ended = AtomicBool::new(false);
    let pattern = Mapped::new(1);
    (0..WORDS).for_each(|word| pattern.write(word, PATTERN));
    let host = pattern.range().start();
    let page = engine.address(0);
    // A device may compile the kernel now.
    run(subject, Operation::Hammer { page });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                run(subject, Operation::Hammer { page });
            }
        });
        let end = Instant::now() + Duration::from_secs(2);
        let mut looks = 0;
        let check = |frames: FrameRange| {
            engine
                .transfer(Transfer::ToDevice { host, frames })
                .expect("a copy");
            std::thread::sleep(Duration::from_millis(3));
            engine.peek(frames)
        };
        let mut intact = true;
        while Instant::now() < end && intact {
            let seen = if looks % 2 == 0 {
                engine.unmapped(0, check)
            } else {
                engine.replaced(0, check)
            };
            if let Some(words) = seen {
                intact = words.iter().all(|&word| word == PATTERN);
                looks += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        ended.store(true, Ordering::SeqCst);
        assert!(
            intact,
            "a kernel wrote to a frame after its page was unmapped"
        );
        assert!(looks > 10, "{looks} looks are too few");
    });
    subject.close();
}

/// Four times as many pages as the device has.
pub fn a_working_set_larger_than_memory_works(subject: Opened) {
    const PAGES: usize = 256;
    let engine = Engine::new(subject, PAGES);
    let (to, count) = (engine.address(0), (PAGES - 1) as u64 * WORDS as u64);
    run(
        subject,
        Operation::Fill {
            to,
            count,
            first: 1,
        },
    );
    let into = engine.address((PAGES - 1) * WORDS);
    run(
        subject,
        Operation::Sum {
            from: to,
            count,
            into,
        },
    );
    engine.evict_all();
    assert_eq!(
        engine.home.read((PAGES - 1) * WORDS),
        count * (count + 1) / 2
    );
    subject.close();
}

/// An access in error ends the kernel and changes nothing.
pub fn errors_of_accesses_end_the_kernel(subject: Opened) {
    let engine = Engine::new(subject, 8);
    engine.protect_from(4);
    for nowhere in [0, 0x1000, (1 << 47) - 4096] {
        let at = VirtAddr::new(nowhere);
        let failed = subject.run(Operation::Increment { at, count: 1 });
        assert_eq!(failed, Err(Failure::NotMapped(at)));
    }
    let read_only = engine.address(5 * WORDS);
    let failed = subject.run(Operation::Fill {
        to: read_only,
        count: 1,
        first: 3,
    });
    assert_eq!(failed, Err(Failure::ReadOnly(read_only)));
    engine.home.write(5 * WORDS, 77);
    let into = engine.address(0);
    run(
        subject,
        Operation::Sum {
            from: read_only,
            count: 1,
            into,
        },
    );
    engine.evict_all();
    assert_eq!([engine.home.read(5 * WORDS), engine.home.read(0)], [77, 77]);
    subject.close();
}

/// A new mapping takes the place of an old one, and fewer rights are fewer.
pub fn mapping_replaces_and_lowers_rights(subject: Opened) {
    let engine = Engine::new(subject, 2);
    let device = subject.device();
    let (at, range) = (engine.address(0), engine.space.page(0));
    run(
        subject,
        Operation::Fill {
            to: at,
            count: 1,
            first: 10,
        },
    );
    let faults = || engine.faults.load(Ordering::SeqCst);
    let before = faults();
    run(subject, Operation::Increment { at, count: 1 });
    assert_eq!(faults(), before, "a mapped page faults");
    engine.unmapped(0, |frames| {
        let other = device.allocate(PageCount::ONE).expect("a frame");
        let host = engine.home.page(1).start();
        engine.home.write(WORDS, 50);
        engine
            .transfer(Transfer::ToDevice {
                host,
                frames: other,
            })
            .expect("a copy");
        device.map(range, frames, Access::Write).expect("a mapping");
        device.map(range, other, Access::Write).expect("another");
        run(subject, Operation::Increment { at, count: 1 });
        assert_eq!(engine.peek(other)[0], 51, "the new frame is used");
        assert_eq!(engine.peek(frames)[0], 11, "the old one is not");
        device.map(range, frames, Access::Read).expect("a mapping");
        device.unmap(range);
        device.free(other);
    });
    engine.unmapped(0, |frames| {
        device.map(range, frames, Access::Read).expect("a mapping");
        // `unmapped` maps it for writing when this is over: not before a kernel has
        // read it.
        let into = engine.address(WORDS);
        let before = faults();
        run(
            subject,
            Operation::Sum {
                from: at,
                count: 1,
                into,
            },
        );
        assert!(faults() <= before + 1, "reading needs no more rights");
    });
    engine.evict_all();
    assert_eq!(engine.home.read(0), 11);
    subject.close();
}

/// Runs are as long as asked at most, disjoint, and all of the memory in the end.
pub fn frames_are_handed_out_once(subject: Opened) {
    let device = subject.device();
    let total = device.info().memory.whole_pages().index();
    assert_eq!(device.free_pages().index(), total);
    let mut used = vec![false; total];
    let mut runs = Vec::new();
    let mut state = 5;
    while device.free_pages().index() > 0 {
        let asked = 1 + random(&mut state) % 40;
        let run = device.allocate(PageCount::new(asked)).expect("free frames");
        assert!(u64::from(run.count()) <= asked);
        for frame in run.iter() {
            assert!(!used[frame.index()], "{frame:?} twice");
            used[frame.index()] = true;
        }
        runs.push(run);
    }
    assert!(used.iter().all(|&used| used));
    // In other groups than they came: all but the first, and then those.
    for run in &runs {
        if run.count() > 1 {
            device.free(run.slice(1, run.count() - 1));
        }
    }
    runs.iter().for_each(|run| device.free(run.slice(0, 1)));
    assert_eq!(device.free_pages().index(), total);
    let all = device.allocate(PageCount::from(total)).expect("all of it");
    assert_eq!(
        all.count() as usize,
        total,
        "one run of a memory that is free"
    );
    device.free(all);
    subject.close();
}

/// Full is an error that passes.
pub fn full_memory_is_an_error(subject: Opened) {
    let device = subject.device();
    let all = device.allocate(device.free_pages()).expect("all of it");
    let one = PageCount::ONE;
    assert_eq!(device.allocate(one), Err(DeviceError::OutOfMemory));
    device.free(all);
    subject.injector().fail_allocations(1);
    assert_eq!(device.allocate(one), Err(DeviceError::OutOfMemory));
    let run = device.allocate(one).expect("a frame");
    device.free(run);
    subject.close();
}

/// A mapping that fails takes what was there with it.
pub fn failing_maps_leave_nothing_mapped(subject: Opened) {
    let engine = Engine::new(subject, 1);
    let at = engine.address(0);
    run(
        subject,
        Operation::Fill {
            to: at,
            count: 1,
            first: 1,
        },
    );
    engine.unmapped(0, |frames| {
        let range = engine.space.page(0);
        let device = subject.device();
        device.map(range, frames, Access::Write).expect("a mapping");
        subject.injector().fail_maps(1);
        let failed = device.map(range, frames, Access::Write);
        assert_eq!(failed, Err(DeviceError::OutOfMemory));
        subject.injector().fail_maps(1); // for the one that `unmapped` ends with
    });
    let before = engine.faults.load(Ordering::SeqCst);
    run(subject, Operation::Increment { at, count: 1 });
    let after = engine.faults.load(Ordering::SeqCst);
    assert!(after > before, "the kernel found a mapping that had failed");
    engine.evict_all();
    assert_eq!(engine.home.read(0), 2);
    subject.close();
}

/// A failed copy is an error of its own fence, or of its submission.
pub fn failing_copies_are_told_once(subject: Opened) {
    let device = subject.device();
    let frames = device.allocate(PageCount::ONE).expect("a frame");
    let memory = Mapped::new(1);
    let host = memory.range().start();
    let copy = [Transfer::ToDevice { host, frames }];
    subject.injector().fail_copies(0, 1, FailAt::Submit);
    assert_eq!(device.submit(&copy), Err(DeviceError::CopyFailed));
    subject.injector().fail_copies(1, 1, FailAt::Wait);
    let good = device.submit(&copy).expect("a submission");
    let bad = device.submit(&copy).expect("a submission");
    let other = device.submit(&copy).expect("a submission");
    assert_eq!(device.wait(other), Ok(()));
    assert_eq!(device.wait(bad), Err(DeviceError::CopyFailed));
    assert_eq!(device.wait(good), Ok(()));
    device.free(frames);
    subject.close();
}

/// Every byte of a copy, of one page and of many; zeros; and only where they belong.
pub fn copies_are_whole(subject: Opened) {
    let device = subject.device();
    for pages in [1u32, 2, 7, 600, 1500] {
        let words = pages as usize * WORDS;
        let (from, to) = (Mapped::new(pages as usize), Mapped::new(pages as usize));
        (0..words).for_each(|word| from.write(word, word as u64 * 3 + 1));
        let mut runs = Vec::new();
        let mut left = pages;
        while left > 0 {
            let run = device
                .allocate(PageCount::new(u64::from(left)))
                .expect("frames");
            left -= run.count();
            runs.push(run);
        }
        let place = |memory: &Mapped, first: u32| memory.page(first as usize).start();
        let mut first = 0;
        for &frames in &runs {
            let host = place(&from, first);
            let middle = frames.slice(frames.count() / 2, 1);
            let home = place(&to, first);
            let all = [
                Transfer::ToDevice { host, frames },
                Transfer::Zero { frames: middle },
                Transfer::ToHost { frames, host: home },
            ];
            let fence = device.submit(&all).expect("a submission");
            device.wait(fence).expect("copies");
            for word in 0..frames.count() as usize * WORDS {
                let zeroed = word / WORDS == (frames.count() / 2) as usize;
                let at = first as usize * WORDS + word;
                let expected = if zeroed { 0 } else { at as u64 * 3 + 1 };
                assert_eq!(to.read(at), expected, "word {at} of {pages} pages");
            }
            first += frames.count();
        }
        runs.into_iter().for_each(|run| device.free(run));
    }
    let view = device.allocate(PageCount::ONE).expect("a frame");
    let memory = Mapped::new(1);
    memory.write(3, 99);
    let host = memory.range().start();
    let fence = device.submit(&[Transfer::ToDevice { host, frames: view }]);
    device.wait(fence.expect("a submission")).expect("a copy");
    let mut seen = None;
    let shown = device.with_host_view(view, &mut |address| {
        let word: *const u64 = std::ptr::with_exposed_provenance(address.addr() + 24);
        // SAFETY: the device says that the frame can be read there now.
        seen = Some(unsafe { word.read_volatile() });
    });
    assert_eq!(seen, shown.then_some(99));
    device.free(view);
    subject.close();
}

/// A lost device says so at every call but those that take away, and gives what it can.
pub fn a_lost_device_says_so(subject: Opened) {
    let engine = Engine::new(subject, 2);
    let at = engine.address(0);
    run(
        subject,
        Operation::Fill {
            to: at,
            count: 2,
            first: 8,
        },
    );
    let device = subject.device();
    let spare = device.allocate(PageCount::ONE).expect("a frame");
    subject.injector().lose(LossMode::MemoryReadable);
    let lost = DeviceError::Lost;
    assert_eq!(device.allocate(PageCount::ONE), Err(lost));
    let range = engine.space.page(1);
    assert_eq!(device.map(range, spare, Access::Read), Err(lost));
    let host = engine.home.page(1).start();
    let to_device = [Transfer::ToDevice {
        host,
        frames: spare,
    }];
    assert_eq!(device.submit(&to_device), Err(lost));
    assert_eq!(
        device.submit(&[Transfer::Zero { frames: spare }]),
        Err(lost)
    );
    let failed = subject.run(Operation::Increment { at, count: 1 });
    assert_eq!(failed, Err(Failure::Lost));
    device.unmap(range);
    device.free(spare);
    engine.evict_all();
    assert_eq!([engine.home.read(0), engine.home.read(1)], [8, 9]);
    subject.injector().lose(LossMode::MemoryGone);
    let frames = FrameRange::new(hmm_types::FrameId::new(0), 1);
    let failed = device.submit(&[Transfer::ToHost { frames, host }]);
    assert_eq!(failed, Err(lost));
    subject.close();
}

/// Loss while a kernel faults ends the kernel.
pub fn a_device_that_is_lost_in_a_kernel_ends_it(subject: Opened) {
    let engine = Engine::new(subject, 256);
    let (at, count) = (engine.address(0), 256 * WORDS as u64);
    let failure = std::thread::scope(|scope| {
        scope.spawn(|| {
            while engine.faults.load(Ordering::SeqCst) < 20 {
                std::thread::yield_now();
            }
            subject.injector().lose(LossMode::MemoryReadable);
        });
        // More than one may come to its end before.
        loop {
            if let Err(failure) = subject.run(Operation::Increment { at, count }) {
                break failure;
            }
        }
    });
    assert_eq!(failure, Failure::Lost);
    engine.evict_all();
    // Each word was incremented as often as kernels got to it, give or take the last.
    let range = (0..256 * WORDS).map(|word| engine.home.read(word));
    let (least, most) = range.fold((u64::MAX, 0), |(a, b), word| (a.min(word), b.max(word)));
    assert!(most <= least + 1, "words between {least} and {most}");
    subject.close();
}

/// Closing does not wait for ever, and nothing works afterwards.
pub fn closing_ends_kernels_and_calls(subject: Opened) {
    let engine = Engine::new(subject, 64);
    let started = AtomicBool::new(false);
    let (at, count) = (engine.address(0), 64 * WORDS as u64);
    let page = engine.address(0);
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
            loop {
                let hammer = subject.run(Operation::Hammer { page });
                started.store(true, Ordering::SeqCst);
                let done = hammer.and_then(|()| subject.run(Operation::Increment { at, count }));
                if let Err(failure) = done {
                    return failure;
                }
            }
        });
        let copier = scope.spawn(|| {
            let memory = Mapped::new(16);
            loop {
                let Ok(frames) = subject.device().allocate(PageCount::new(16)) else {
                    return;
                };
                let host = memory.range().start();
                let frames_of_run = frames;
                let _ = engine.transfer(Transfer::ToHost {
                    frames: frames_of_run.slice(0, 1),
                    host,
                });
                subject.device().free(frames);
            }
        });
        while !started.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let since = Instant::now();
        subject.close();
        let took = since.elapsed();
        assert!(took < Duration::from_secs(20), "closing took {took:?}");
        let failure = runner.join().expect("the launching thread");
        let ended = matches!(failure, Failure::Closed | Failure::Lost);
        assert!(ended, "the kernel ended with {failure:?}");
        copier.join().expect("the copying thread");
    });
    let device = subject.device();
    assert_eq!(device.allocate(PageCount::ONE), Err(DeviceError::Lost));
    device.unmap(engine.space.page(0));
    subject.close();
}
