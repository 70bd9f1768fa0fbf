//! What can be wrong with a kernel, a driver or a device: it is said, bounded, and no page
//! is lost.
mod common;

use std::time::{Duration, Instant};

use common::either::{WORDS_KERNEL, add_vulkan, assert_silent, program, push, spirv};
use common::{
    AnyDevice, Device, Kind, Map, Operation, WORDS, Work, adds_up, all_free, device, helper, open,
    pattern, role, run, send, watchdog,
};
use hmm::{
    ByteCount, Demand, Hmm, LaunchVulkanError, ProgramOptions, StayReason, Used, VulkanDevice,
    VulkanError, VulkanOptions,
};

/// Never ends, and touches nothing before.
const RUNAWAY: &[u8] = include_bytes!("kernels/runaway.spv");
/// Follows pointers: in a ring, for ever.
const FOREVER: &[u8] = include_bytes!("kernels/forever.spv");

/// Follows pointers to their end, and adds up what it passes.
const CHASE: &[u8] = include_bytes!("kernels/chase.spv");

const LIMIT: Duration = Duration::from_millis(500);
/// What may pass until a kernel that was told to stop has done so.
const PATIENCE: Duration = Duration::from_secs(15);

fn opened(memory: ByteCount) -> Result<(Hmm, VulkanDevice), String> {
    let hmm = Hmm::open().expect("an engine");
    let options = VulkanOptions::new(memory)
        .poison_freed(true)
        .dispatch_limit(LIMIT);
    let device = add_vulkan(&hmm, options)?;
    Ok((hmm, device))
}

/// A ring of nodes, one at the start of each page; the rest has a pattern.
fn ring(map: &Map) {
    map.fill(1);
    for page in 0..map.pages() {
        let next = map.page((page + 1) % map.pages());
        map.set(page * WORDS, next.expose_provenance() as u64);
    }
}

fn check_ring(map: &Map) {
    for page in 0..map.pages() {
        let next = map.page((page + 1) % map.pages()).addr() as u64;
        assert_eq!(map.get(page * WORDS), next, "page {page}");
        for word in page * WORDS + 1..(page + 1) * WORDS {
            assert_eq!(map.get(word), pattern(1, word), "page {page} word {word}");
        }
    }
}

fn demand(kind: Kind) -> ProgramOptions<'static> {
    ProgramOptions {
        demand: match kind {
            Kind::Waiting => Demand::Wait,
            _ => Demand::Repeat,
        },
        ..ProgramOptions::default()
    }
}

/// After an error the device works as before, and has all of its memory.
fn goes_on(hmm: Hmm, kind: Kind, device: VulkanDevice, map: Map) {
    let device = Device::vulkan(kind, device);
    let add = Work::new(Operation::Add, map.word(1)).pages(map.pages());
    device.run(add.value(5)).expect("the device goes on");
    for page in 0..map.pages() {
        let word = page * WORDS + 1;
        assert_eq!(map.get(word), pattern(1, word).wrapping_add(5));
    }
    drop(map);
    all_free(&hmm, &device);
    assert_eq!(hmm.statistics().lost_pages, 0);
    assert!(device.remove().unwrap());
    assert_silent();
    hmm.shutdown().unwrap();
}

fn launch(
    device: VulkanDevice,
    kind: Kind,
    shader: &[u8],
    words: &[u64],
    map: &Map,
) -> Result<(), LaunchVulkanError> {
    let program = program(&device, shader, demand(kind));
    let push = push(&program, words);
    let since = Instant::now();
    let done = match kind {
        Kind::Named => {
            let all = std::ptr::slice_from_raw_parts_mut(map.at(), map.bytes());
            let used = [Used::write(all).unwrap()];
            device.launch_with(&program, [1, 1, 1], &push, &used)
        }
        _ => device.launch(&program, [1, 1, 1], &push),
    };
    println!("after {:?}: {done:?}", since.elapsed());
    assert!(since.elapsed() < PATIENCE, "{:?}", since.elapsed());
    done.map(drop)
}

fn is_runaway(done: &Result<(), LaunchVulkanError>) -> bool {
    let said = format!("{done:?}");
    done.is_err() && said.contains("Runaway { limit_ms: 500 }")
}

/// What becomes of a kernel that does not end, and of the pages of its device.
fn runs_away(kind: Kind, name: &str, shader: &[u8]) {
    // One that does not check does not look whether it is to stop: it goes on until its
    // process ends.
    if kind == Kind::Named && role().is_none() {
        let (status, text) = run(helper(&kind.test(name), "runs-away"), 50);
        println!("{text}");
        if let Some(reason) = text.lines().find(|line| line.contains("SKIPPED")) {
            skip!("{reason}");
        }
        assert!(status.is_some_and(|status| status.success()), "{status:?}");
        assert!(text.contains("home again"));
        return;
    }
    let (hmm, device) = or_skip!(opened(ByteCount::mib(4)));
    let map = Map::new(200);
    ring(&map);
    send(&hmm, map.range(), &device);
    let words = match shader {
        FOREVER => vec![map.word(0).addr() as u64, map.word(1).addr() as u64],
        _ => vec![map.word(1).addr() as u64],
    };
    let done = std::thread::scope(|scope| {
        let kernel = scope.spawn(|| launch(device, kind, shader, &words, &map));
        // A CPU takes pages away for a while.
        for page in 0..10 {
            std::thread::sleep(LIMIT / 10);
            let word = (page * 17 + 3) * WORDS + 2;
            if kind != Kind::Named {
                assert_eq!(map.get(word), pattern(1, word));
            }
        }
        kernel.join().unwrap()
    });
    if kind == Kind::Named {
        assert_eq!(done, Err(LaunchVulkanError::Lost));
        check_ring(&map);
        assert_eq!(hmm.statistics().lost_pages, 0);
        eprintln!("home again");
        assert!(device.remove().unwrap());
        hmm.shutdown().unwrap();
        return;
    }
    assert!(is_runaway(&done), "{done:?}");
    check_ring(&map);
    goes_on(hmm, kind, device, map);
}

on_each!(a_loop_without_an_end_is_ended: vulkan, waiting, named);
fn a_loop_without_an_end_is_ended(kind: Kind) {
    let _dog = watchdog("a_loop_without_an_end_is_ended", 60);
    runs_away(kind, "a_loop_without_an_end_is_ended", RUNAWAY);
}

on_each!(a_chase_without_an_end_is_ended: vulkan, waiting, named);
fn a_chase_without_an_end_is_ended(kind: Kind) {
    let _dog = watchdog("a_chase_without_an_end_is_ended", 60);
    runs_away(kind, "a_chase_without_an_end_is_ended", FOREVER);
}

/// The ring is larger than the device: each step misses a page, for ever.
#[test]
fn a_chase_of_more_than_there_is_room_for_is_ended() {
    let _dog = watchdog("a_chase_of_more_than_there_is_room_for_is_ended", 60);
    let (hmm, device) = or_skip!(opened(ByteCount::mib(1)));
    let map = Map::new(600);
    ring(&map);
    let words = [map.word(0).addr() as u64, map.word(1).addr() as u64];
    let done = launch(device, Kind::Vulkan, FOREVER, &words, &map);
    let said = format!("{done:?}");
    assert!(said.contains("Thrash"), "{said}");
    check_ring(&map);
    goes_on(hmm, Kind::Vulkan, device, map);
}

/// A kernel that waits gets its pages as long as it asks for them. It ends with the
/// device.
#[test]
fn a_chase_that_asks_for_pages_for_ever_ends_with_its_device() {
    let _dog = watchdog(
        "a_chase_that_asks_for_pages_for_ever_ends_with_its_device",
        60,
    );
    let (hmm, device) = or_skip!(opened(ByteCount::mib(1)));
    let map = Map::new(600);
    ring(&map);
    let words = [map.word(0).addr() as u64, map.word(1).addr() as u64];
    std::thread::scope(|scope| {
        let kernel = scope.spawn(|| {
            let program = program(&device, FOREVER, demand(Kind::Waiting));
            device.launch(&program, [1, 1, 1], &push(&program, &words))
        });
        std::thread::sleep(3 * LIMIT);
        assert!(!kernel.is_finished(), "{:?}", kernel.join());
        assert!(device.remove().unwrap());
        let done = kernel.join().unwrap();
        println!("{done:?}");
        assert!(done.is_err());
    });
    check_ring(&map);
    assert_eq!(hmm.statistics().lost_pages, 0);
    hmm.shutdown().unwrap();
}

/// A kernel that waits can ask for pages for as long as it likes, but for a limit that it
/// is given.
#[test]
fn a_chase_that_asks_for_pages_for_ever_ends_at_its_limit() {
    let _dog = watchdog("a_chase_that_asks_for_pages_for_ever_ends_at_its_limit", 60);
    let hmm = Hmm::open().expect("an engine");
    let options = VulkanOptions::new(ByteCount::mib(1))
        .poison_freed(true)
        .launch_limit(8 * LIMIT);
    let device = or_skip!(add_vulkan(&hmm, options));
    let map = Map::new(600);
    ring(&map);
    let words = [map.word(0).addr() as u64, map.word(1).addr() as u64];
    let done = launch(device, Kind::Waiting, FOREVER, &words, &map);
    let said = format!("{done:?}");
    assert!(said.contains("Runaway { limit_ms: 4000 }"), "{said}");
    check_ring(&map);
    goes_on(hmm, Kind::Waiting, device, map);
}

on_each!(a_small_device_works_by_eviction: vulkan, waiting);
fn a_small_device_works_by_eviction(kind: Kind) {
    const PAGES: usize = 1500;
    let _dog = watchdog("a_small_device_works_by_eviction", 100);
    let (hmm, device) = or_skip!(open(kind, 1));
    let map = Map::new(PAGES);
    map.fill(3);
    for round in 1..=3 {
        let add = Work::new(Operation::Add, map.word(0)).count(PAGES * WORDS);
        device.run(add.value(1)).unwrap();
        let word = round * 100 * WORDS;
        assert_eq!(map.get(word), pattern(3, word).wrapping_add(round as u64));
    }
    for word in 0..PAGES * WORDS {
        assert_eq!(map.get(word), pattern(3, word).wrapping_add(3), "{word}");
    }
    assert!(hmm.statistics().evicted_pages > 0);
    drop(map);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

/// An invocation that needs a dozen pages far from each other, of 256 that there are: what
/// comes along with one of them must not drive away the others.
#[test]
fn few_pages_in_many_places_are_not_too_many() {
    const NODES: usize = 12;
    const STEP: usize = 64 * WORDS;
    let _dog = watchdog("few_pages_in_many_places_are_not_too_many", 60);
    let (hmm, device) = or_skip!(opened(ByteCount::mib(1)));
    let map = Map::new(NODES * 64 + 1);
    for node in 0..NODES {
        let next = match node + 1 {
            NODES => 0,
            next => map.word(next * STEP).expose_provenance() as u64,
        };
        map.set(node * STEP, next);
        map.set(node * STEP + 1, node as u64);
    }
    let heads = NODES * STEP;
    map.set(heads, map.word(0).expose_provenance() as u64);
    let words = [heads, heads + 1].map(|word| map.word(word).addr() as u64);
    let done = launch(device, Kind::Vulkan, CHASE, &[words[0], words[1], 1], &map);
    done.unwrap();
    assert_eq!(map.get(heads + 1), (0..NODES as u64).sum());
    hmm.shutdown().unwrap();
}

/// What is named has to be there at one time.
#[test]
fn more_than_the_device_holds_cannot_be_named() {
    let _dog = watchdog("more_than_the_device_holds_cannot_be_named", 60);
    for mib in [1, 2, 4] {
        let (hmm, device) = or_skip!(open(Kind::Named, mib));
        let pages = usize::try_from(mib << 8).unwrap();
        let map = Map::new(pages + 1);
        map.fill(4);
        let too_many = Work::new(Operation::Add, map.word(0)).pages(pages + 1);
        let error = device.run(too_many.value(1)).unwrap_err();
        println!("{mib} MiB: {error}");
        assert!(
            error.is("NoDeviceMemory") || error.is("Thrash"),
            "{}",
            error.parts
        );
        map.check(4);
        // All of it fits.
        let all = Work::new(Operation::Add, map.word(0)).pages(pages);
        device.run(all.value(1)).unwrap();
        for page in 0..pages {
            let word = page * WORDS;
            assert_eq!(map.get(word), pattern(4, word).wrapping_add(1));
        }
        drop(map);
        all_free(&hmm, &device);
        hmm.shutdown().unwrap();
    }
}

/// Instructions of a module: opcode, and where its words begin.
fn instructions(words: &[u32]) -> Vec<(u32, usize)> {
    let (mut at, mut all) = (5, Vec::new());
    while at < words.len() {
        all.push((words[at] & 0xffff, at));
        at += (words[at] >> 16) as usize;
    }
    all
}

#[test]
fn spirv_that_is_none_is_refused_by_name() {
    const CAPABILITY: u32 = 17;
    const MEMORY_MODEL: u32 = 14;
    const STORE: u32 = 62;
    let _dog = watchdog("spirv_that_is_none_is_refused_by_name", 60);
    let (hmm, device) = or_skip!(opened(ByteCount::mib(1)));
    let whole = spirv(WORDS_KERNEL);
    let with = |opcode: u32, word: usize, value: u32| {
        let mut words = whole.clone();
        let all = instructions(&whole);
        let (_, at) = all
            .into_iter()
            .find(|it| it.0 == opcode)
            .expect("such a one");
        words[at + word] = value;
        words
    };
    let mut noise = common::Rng::new(common::seed());
    let mut noisy = whole[..5].to_vec();
    noisy.extend((0..2000).map(|_| u32::try_from(noise.next() >> 32).unwrap()));
    let mut newer = whole.clone();
    newer[1] = 0x0001_0600;
    let mut wide = whole.clone();
    let last = wide.len() - 1;
    wide[last] |= 0xffff << 16;
    let modules: [(&str, Vec<u32>, &str); 12] = [
        ("nothing", Vec::new(), "no SPIR-V"),
        ("three words", vec![1, 2, 3], "no SPIR-V"),
        ("a header", whole[..5].to_vec(), "GLCompute"),
        ("a torn end", whole[..whole.len() - 3].to_vec(), ""),
        ("a length without words", wide, "SPIR-V"),
        ("noise", noisy, ""),
        ("a newer version", newer, "SPIR-V 1.6"),
        ("a kernel of OpenCL", with(CAPABILITY, 1, 6), "Kernel"),
        (
            "untyped pointers",
            with(CAPABILITY, 1, 4473),
            "UntypedPointersKHR",
        ),
        (
            "an unknown capability",
            with(CAPABILITY, 1, 60_000),
            "capability",
        ),
        ("no pointers", with(MEMORY_MODEL, 1, 0), "addressing model"),
        (
            "an unknown opcode",
            with(STORE, 0, 3 << 16 | 60_001),
            "60001",
        ),
    ];
    for (what, words, named) in modules {
        // SAFETY: refused before any driver sees it, as is checked here.
        let made = unsafe { device.driver().program(&words, ProgramOptions::default()) };
        let error = made.expect_err(what);
        println!("{what}: {error}");
        let bad = matches!(
            error,
            VulkanError::BadKernel { .. } | VulkanError::Feature { .. }
        );
        assert!(bad && error.to_string().contains(named), "{what}: {error}");
    }
    // And one that is one.
    let device = Device::vulkan(Kind::Vulkan, device);
    let map = Map::new(1);
    device
        .run(Work::new(Operation::Add, map.word(0)).value(2))
        .unwrap();
    assert_eq!(map.get(0), 2);
    drop(map);
    hmm.shutdown().unwrap();
}

/// Without a driver, or without Vulkan, that is the answer; the engine is as it was.
#[test]
fn without_a_driver_the_error_says_so() {
    const NAME: &str = "without_a_driver_the_error_says_so";
    let _dog = watchdog(NAME, 60);
    if role().as_deref() == Some("no-driver") {
        let hmm = Hmm::open().unwrap();
        let added = hmm.add_vulkan_device(VulkanOptions::new(ByteCount::mib(4)));
        eprintln!("error: {}", added.unwrap_err());
        let device = device(&hmm, 4);
        let map = Map::new(100);
        map.fill(1);
        send(&hmm, map.range(), &device);
        map.check(1);
        hmm.shutdown().unwrap();
        return;
    }
    for files in ["/nowhere", ""] {
        let mut command = helper(NAME, "no-driver");
        command
            .env("VK_DRIVER_FILES", files)
            .env("VK_ICD_FILENAMES", files)
            .env("HMM_VULKAN_VALIDATION", "");
        if files.is_empty() {
            // The loader looks into folders of the system otherwise.
            command.env("VK_LOADER_DRIVERS_DISABLE", "*");
        }
        let (status, text) = run(command, 30);
        println!("{text}");
        assert!(status.expect("it ends").success(), "{text}");
        let known = ["no Vulkan device", "there is no Vulkan here"];
        assert!(known.iter().any(|error| text.contains(error)), "{text}");
    }
}

/// The device is lost while kernels run and a CPU looks on.
#[test]
fn a_device_that_is_lost_under_a_kernel_gives_back_what_can_be_read() {
    let _dog = watchdog("a_device_that_is_lost_under_a_kernel", 60);
    for kind in [Kind::Vulkan, Kind::Waiting, Kind::Named] {
        let (hmm, device) = or_skip!(open(kind, 8));
        let map = Map::new(1000);
        map.fill(0);
        let add = Work::new(Operation::Add, map.word(0)).count(map.pages() * WORDS);
        let launches = std::thread::scope(|scope| {
            let kernels = scope.spawn(|| {
                let mut launches = 0u64;
                loop {
                    match device.run(add.value(1)) {
                        Ok(()) => launches += 1,
                        Err(error) => {
                            assert!(error.lost || error.is("DeviceLost"), "{}", error.parts);
                            return launches;
                        }
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(200));
            device.injector().lose(hmm::LossMode::MemoryReadable);
            kernels.join().unwrap()
        });
        // The last one may have come this far with each word, or not.
        for word in 0..map.pages() * WORDS {
            let added = map.get(word).wrapping_sub(pattern(0, word));
            assert!(
                added == launches || added == launches + 1,
                "{kind:?}: word {word}: {added} of {launches}"
            );
        }
        let report = hmm.migrate(map.range(), device.id());
        println!("{kind:?}: {launches} launches, then {report:?}");
        if let Ok(report) = report {
            adds_up(&report, map.range());
            assert!(
                report
                    .stayed
                    .iter()
                    .all(|stay| stay.reason == StayReason::DeviceLost)
            );
        }
        assert_eq!(hmm.statistics().lost_pages, 0);
        assert!(device.remove().unwrap());
        hmm.shutdown().unwrap();
    }
}

/// Memory that threads map while a kernel is compiled is the program's, whatever it
/// looked like. What they unmap is the compiler's if it gets that.
#[test]
fn memory_that_is_mapped_while_a_kernel_is_compiled_can_be_used() {
    let _dog = watchdog(
        "memory_that_is_mapped_while_a_kernel_is_compiled_can_be_used",
        60,
    );
    let (hmm, device) = or_skip!(opened(ByteCount::mib(16)));
    let made = std::sync::atomic::AtomicBool::new(false);
    let (mut devices, mut maps) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let early: Vec<Map> = (0..10).map(|_| Map::new(2)).collect();
        let mapper = scope.spawn(|| {
            let (mut maps, mut early) = (Vec::new(), early);
            while !made.load(std::sync::atomic::Ordering::Relaxed) && maps.len() < 200 {
                // Apart from each other.
                let map = Map::new(3);
                map.protect(2, 1, libc::PROT_NONE);
                maps.push(map);
                if maps.len() % 4 == 0 {
                    early.pop();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            maps
        });
        for kind in [Kind::Vulkan, Kind::Waiting, Kind::Named] {
            let device = Device::vulkan(kind, device);
            let map = Map::new(1);
            device
                .run(Work::new(Operation::Store, map.word(0)).value(1))
                .unwrap();
            devices.push(device);
        }
        made.store(true, std::sync::atomic::Ordering::Relaxed);
        maps = mapper.join().unwrap();
    });
    println!("{} mappings meanwhile", maps.len());
    assert!(!maps.is_empty());
    for (number, map) in maps.iter().enumerate() {
        let device = &devices[number % devices.len()];
        let add = Work::new(Operation::Add, map.word(0)).pages(2).value(1);
        device.run(add).unwrap();
        assert_eq!([map.get(0), map.get(WORDS)], [1, 1]);
    }
    drop((maps, devices));
    assert!(device.remove().unwrap());
    hmm.shutdown().unwrap();
}
