//! A Vulkan device uses files and shared memory where they are: imported for a launch,
//! and whatever the program does to its mappings meanwhile is an error of that launch at
//! most.
mod common;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::either::{add_vulkan, assert_silent, spirv};
use common::{HUGE, Map, PAGE, Rng, WORDS, seed, watchdog};
use hmm::{
    ByteCount, Demand, Hmm, ImportFailure, LaunchVulkanError, Program, ProgramOptions, StayReason,
    Used, VulkanCopies, VulkanDevice, VulkanKernelError, VulkanOptions,
};

const INCREMENT: &[u8] = include_bytes!("kernels/increment.spv");
const SUM: &[u8] = include_bytes!("kernels/sum.spv");
const SAXPY: &[u8] = include_bytes!("kernels/saxpy.spv");
const WALK: &[u8] = include_bytes!("kernels/walk_write.spv");

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Not a multiple of a block, nor of 64 KiB.
const PAGES: usize = 1203;
/// 32-bit words of a page.
const HALVES: usize = PAGE / 4;

fn options() -> VulkanOptions<'static> {
    VulkanOptions::new(ByteCount::mib(32))
        .poison_freed(true)
        .like_a_gpu()
        .in_place(true)
}

/// An engine with such a device, or why there is none.
fn open(options: VulkanOptions<'_>) -> Result<(Hmm, VulkanDevice), String> {
    let hmm = Hmm::open().unwrap();
    let device = add_vulkan(&hmm, options)?;
    let imports = device.describe().imports_pages();
    let opened = imports.then_some((hmm, device));
    opened.ok_or_else(|| "the driver imports no memory".to_owned())
}

fn program(device: &VulkanDevice, bytes: &[u8]) -> Program {
    program_of(device, bytes, false)
}

fn program_of(device: &VulkanDevice, bytes: &[u8], idempotent: bool) -> Program {
    let options = ProgramOptions {
        demand: Demand::Repeat,
        idempotent,
        ..ProgramOptions::default()
    };
    common::either::program(device, bytes, options)
}

fn push(program: &Program, pointers: &[*const u8], words: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for pointer in pointers {
        bytes.extend_from_slice(&(pointer.addr() as u64).to_le_bytes());
    }
    for word in words {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.resize(program.info().push_constant_bytes as usize, 0);
    bytes
}

type Done = Result<hmm::VulkanReport, LaunchVulkanError>;

/// Adds one to each of the first 32-bit words.
fn increment(device: &VulkanDevice, program: &Program, map: &Map, words: usize) -> Done {
    let count = u32::try_from(words).unwrap();
    let push = push(program, &[map.page(0)], &[count]);
    device.launch(program, [count.div_ceil(64), 1, 1], &push)
}

/// Sums of so many 32-bit words each, of `pages` pages, by 64 invocations.
fn sums(device: &VulkanDevice, program: &Program, map: &Map, into: &Map, pages: usize) -> Done {
    let run = u32::try_from(pages * HALVES / 64).unwrap();
    let push = push(program, &[map.page(0), into.page(0)], &[run]);
    device.launch(program, [1, 1, 1], &push)
}

fn half(map: &Map, index: usize) -> u32 {
    let word = map.get(index / 2);
    #[allow(clippy::cast_possible_truncation, reason = "one half")]
    let half = (word >> (32 * (index % 2))) as u32;
    half
}

fn memfd(pages: usize) -> File {
    // SAFETY: a new descriptor, given to its owner at once.
    let file = unsafe {
        let fd = libc::memfd_create(c"in-place".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create");
        File::from_raw_fd(fd)
    };
    file.set_len((pages * PAGE) as u64).unwrap();
    file
}

fn on_disk(pages: usize) -> File {
    let name = format!("hmm-vulkan-in-place-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).truncate(true);
    let file = options.open(&path).expect("a file for the test");
    std::fs::remove_file(&path).expect("the file can be removed");
    file.set_len((pages * PAGE) as u64).unwrap();
    file
}

fn shared(file: &File, pages: usize) -> Map {
    Map::with(pages, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd())
}

/// Nothing is imported. (A fault's neighbours may still be on the device: also what is not
/// the test's.)
fn end(hmm: Hmm, device: &VulkanDevice) {
    let stats = device.stats();
    println!("{stats:?}");
    assert_eq!(stats.imported_now, 0);
    hmm.shutdown().unwrap();
    assert_silent();
}

fn kernel_error(done: Done) -> VulkanKernelError {
    match done {
        Err(LaunchVulkanError::Kernel(error)) => error,
        other => panic!("no error of the kernel: {other:?}"),
    }
}

fn import_failure(done: Done) -> ImportFailure {
    match kernel_error(done) {
        VulkanKernelError::NotImported { why, .. } => why,
        other => panic!("no failure of an import: {other}"),
    }
}

/// Both as on a GPU and with the CPU's copies.
#[test]
fn shared_memory_is_read_and_written_where_it_is() {
    let _dog = watchdog("shared_memory_is_read_and_written_where_it_is", 120);
    let like_a_cpu = VulkanOptions::new(ByteCount::mib(32)).in_place(true);
    for options in [options(), like_a_cpu] {
        let (hmm, device) = or_skip!(open(options));
        let program = program(&device, INCREMENT);
        let map = Map::with(PAGES, READ_WRITE, libc::MAP_SHARED, -1);
        for word in 0..PAGES * WORDS {
            map.set(word, (word as u64) << 33 | word as u64);
        }
        let faults = hmm.statistics().device_faults;
        for round in 1..=3u64 {
            increment(&device, &program, &map, PAGES * HALVES).unwrap();
            assert_eq!(device.stats().imported_now, 0, "no longer than a launch");
            for word in 0..PAGES * WORDS {
                let before = (word as u64) << 33 | word as u64;
                assert_eq!(map.get(word), before + (round << 32 | round), "word {word}");
            }
        }
        let faults = hmm.statistics().device_faults - faults;
        // A run is read first, then written: twice for each block and launch.
        assert!(faults <= 3 * 2 * 5, "{faults} faults for {PAGES} pages");
        assert!(device.stats().imports <= faults);
        assert_eq!(device.stats().bytes_to_device, 0, "nothing was copied");
        drop((program, map));
        end(hmm, &device);
    }
}

#[test]
fn what_is_written_reaches_the_file() {
    let _dog = watchdog("what_is_written_reaches_the_file", 120);
    let (hmm, device) = or_skip!(open(options()));
    let program = program(&device, INCREMENT);
    for file in [memfd(PAGES), on_disk(PAGES)] {
        let map = shared(&file, PAGES);
        for page in (0..PAGES).step_by(7) {
            map.set(page * WORDS, page as u64);
        }
        let words = PAGES * HALVES - 5;
        increment(&device, &program, &map, words).unwrap();
        let mut bytes = vec![0; PAGES * PAGE];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for (index, bytes) in bytes.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes(bytes.try_into().unwrap());
            let (page, word) = (index / HALVES, index % HALVES);
            let before = if word == 0 && page % 7 == 0 { page } else { 0 };
            let after = u32::try_from(before).unwrap() + u32::from(index < words);
            assert_eq!((value, half(&map, index)), (after, after), "word {index}");
        }
        // What the program writes to the file is seen by the next launch.
        file.write_all_at(&41u32.to_le_bytes(), 0).unwrap();
        increment(&device, &program, &map, 1).unwrap();
        assert_eq!(half(&map, 0), 42);
    }
    drop(program);
    end(hmm, &device);
}

/// Read-only mappings can be read, and not written.
#[test]
fn read_only_files_are_read() {
    let _dog = watchdog("read_only_files_are_read", 60);
    let (hmm, device) = or_skip!(open(options()));
    let (sum, add) = (program(&device, SUM), program(&device, INCREMENT));
    let file = memfd(64);
    shared(&file, 64).fill(4);
    let map = Map::with(64, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd());
    let into = Map::new(1);
    into.set(0, 1);
    sums(&device, &sum, &map, &into, 64).unwrap();
    let first = (0..HALVES).fold(0u32, |sum, at| sum.wrapping_add(half(&map, at)));
    assert_eq!(half(&into, 0), first);
    let refused = kernel_error(increment(&device, &add, &map, 1));
    assert!(refused.to_string().contains("read-only"), "{refused}");
    map.check(4);
    drop((sum, add, into));
    end(hmm, &device);
}

/// One launch uses a file where it is and memory that migrates.
#[test]
fn memory_that_migrates_still_does() {
    const COUNT: usize = 300 * HALVES;
    let _dog = watchdog("memory_that_migrates_still_does", 120);
    for options in [options(), options().copies(VulkanCopies::QueueImports)] {
        let (hmm, device) = or_skip!(open(options));
        let program = program_of(&device, SAXPY, true);
        let file = memfd(300);
        let (x, y, z) = (shared(&file, 300), Map::new(300), Map::new(300));
        let pack = |low: f32, high: f32| u64::from(low.to_bits()) | u64::from(high.to_bits()) << 32;
        for word in 0..300 * WORDS {
            let at = (word % 1000) as f32;
            x.set(word, pack(at, at + 1.0));
            y.set(word, pack(5.0, at));
        }
        let count = u32::try_from(COUNT).unwrap();
        let push = push(
            &program,
            &[x.page(0), y.page(0), z.page(0)],
            &[2.0f32.to_bits(), count],
        );
        let check = || {
            for word in 0..300 * WORDS {
                let at = (word % 1000) as f32;
                let right = pack(2.0 * at + 5.0, 3.0 * at + 2.0);
                assert_eq!(z.get(word), right, "word {word}");
            }
        };
        let groups = [count.div_ceil(64), 1, 1];
        device.launch(&program, groups, &push).unwrap();
        let there = |map: &Map| {
            let residency = hmm.residency(map.range()).unwrap();
            residency.on_device(device.id()).get()
        };
        assert_eq!((there(&x), there(&y), there(&z)), (0, 300, 300));
        check();
        assert!(device.stats().imports > 0);
        // The same with all of it named.
        z.fill(0);
        let named = |map: &Map| {
            let all = std::ptr::slice_from_raw_parts_mut(map.at(), map.bytes());
            Used::write(all).unwrap()
        };
        let used = [named(&x), named(&y), named(&z)];
        let report = device.launch_with(&program, groups, &push, &used).unwrap();
        assert_eq!((report.dispatches, report.distance), (1, None));
        check();
        drop((program, x, y, z));
        end(hmm, &device);
    }
}

/// What was mapped anew between two launches is seen by the second, and what was
/// unmapped is an error of it.
#[test]
fn the_next_launch_sees_what_the_program_has_changed() {
    let _dog = watchdog("the_next_launch_sees_what_the_program_has_changed", 60);
    let (hmm, device) = or_skip!(open(options()));
    let program = program(&device, INCREMENT);
    let (first, second) = (memfd(PAGES), memfd(PAGES));
    let map = shared(&first, PAGES);
    increment(&device, &program, &map, PAGES * HALVES).unwrap();
    let replace = |from: usize, pages: usize, offset: usize| {
        // SAFETY: a part of the test's own mapping is replaced.
        let placed = unsafe {
            libc::mmap(
                map.page(from).cast(),
                pages * PAGE,
                READ_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                second.as_raw_fd(),
                (offset * PAGE) as i64,
            )
        };
        assert_eq!(placed, map.page(from).cast());
    };
    // In the middle of a block, with another offset.
    replace(100, 50, 7);
    increment(&device, &program, &map, PAGES * HALVES).unwrap();
    let old = shared(&first, PAGES);
    let new = shared(&second, PAGES);
    for page in 0..PAGES {
        let replaced = (100..150).contains(&page);
        let expected = if replaced { 1 } else { 2 };
        assert_eq!(half(&old, page * HALVES), expected, "page {page}");
        let of_new = u32::from((7..57).contains(&page));
        assert_eq!(half(&new, page * HALVES), of_new, "page {page}");
    }
    // Private memory in the middle: that migrates.
    map.unmap_part(200, 30);
    // SAFETY: where nothing is mapped.
    let placed = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        libc::mmap(map.page(200).cast(), 30 * PAGE, READ_WRITE, flags, -1, 0)
    };
    assert_eq!(placed, map.page(200).cast());
    increment(&device, &program, &map, PAGES * HALVES).unwrap();
    let there = hmm.residency(map.range()).unwrap().on_device(device.id());
    assert_eq!(there.get(), 30);
    for page in 0..PAGES {
        let expected = match page {
            100..150 => 2,
            200..230 => 1,
            _ => 3,
        };
        assert_eq!(half(&map, page * HALVES), expected, "page {page}");
    }
    // And a hole.
    map.unmap_part(600, 1);
    let refused = kernel_error(increment(&device, &program, &map, PAGES * HALVES));
    assert!(
        refused.to_string().contains("nothing is mapped"),
        "{refused}"
    );
    drop((program, map));
    end(hmm, &device);
}

/// A file that ends in the middle of its mapping: an error where it has ended, and it
/// can be used up to there.
#[test]
fn behind_the_end_of_a_file_is_an_error() {
    let _dog = watchdog("behind_the_end_of_a_file_is_an_error", 60);
    let (hmm, device) = or_skip!(open(options()));
    let program = program(&device, INCREMENT);
    for file in [memfd(PAGES), on_disk(PAGES)] {
        let map = shared(&file, PAGES);
        file.set_len(600 * PAGE as u64).unwrap();
        increment(&device, &program, &map, 600 * HALVES).unwrap();
        let refused = import_failure(increment(&device, &program, &map, 600 * HALVES + 1));
        assert_eq!(refused, ImportFailure::Gone);
        file.set_len((PAGES * PAGE) as u64).unwrap();
        increment(&device, &program, &map, PAGES * HALVES).unwrap();
        let last = (half(&map, 600 * HALVES - 1), half(&map, 600 * HALVES));
        assert!(last.0 >= 2 && last.1 == 1, "{last:?}");
    }
    drop(program);
    end(hmm, &device);
}

/// What cannot be imported is an error with the reason, and the program's memory is what
/// it was.
#[test]
fn what_cannot_be_imported_is_an_error_with_the_reason() {
    let _dog = watchdog("what_cannot_be_imported_is_an_error_with_the_reason", 60);
    let (hmm, device) = or_skip!(open(options()));
    let add = program(&device, INCREMENT);
    let file = memfd(20);
    let private = Map::with(20, READ_WRITE, libc::MAP_PRIVATE, file.as_raw_fd());
    private.fill(3);
    let refused = import_failure(increment(&device, &add, &private, 10));
    assert_eq!(refused, ImportFailure::Private);
    private.check(3);
    // A kernel that waits for its pages: it has begun when it meets one.
    let map = shared(&file, 20);
    map.set(0, 0);
    map.set(1, 5);
    let board = Map::new(1);
    board.set(0, map.page(0).addr() as u64);
    // SAFETY: a compiler's output, as in `program`.
    let walk = unsafe {
        let words = spirv(WALK);
        let options = ProgramOptions::default();
        device.driver().program(&words, options)
    }
    .unwrap();
    let parameters = push(&walk, &[board.page(0)], &[1]);
    match device.launch(&walk, [1, 1, 1], &parameters) {
        // It cannot wait on this device, and is refused before.
        Err(LaunchVulkanError::NotMade { .. }) => {}
        done => assert_eq!(import_failure(done), ImportFailure::Runs),
    }
    assert_eq!(map.get(1), 5);
    // Named, it is there before.
    let named = |map: &Map| {
        let all = std::ptr::slice_from_raw_parts_mut(map.at(), map.bytes());
        Used::write(all).unwrap()
    };
    let used = [named(&map), named(&board)];
    device
        .launch_with(&walk, [1, 1, 1], &parameters, &used)
        .unwrap();
    assert_eq!(map.get(1), 6);
    drop((add, walk, board));
    end(hmm, &device);
    // Not asked for: as without.
    let (hmm, device) = or_skip!(open(options().in_place(false)));
    let add = program(&device, INCREMENT);
    let refused = kernel_error(increment(&device, &add, &map, 10));
    let reason = StayReason::Shared.to_string();
    assert!(refused.to_string().contains(&reason), "{refused}");
    assert_eq!(device.stats().imports, 0);
    drop(add);
    end(hmm, &device);
}

/// Huge pages that are shared: by the file behind them, which takes root.
#[test]
fn shared_huge_pages_are_used_where_they_are() {
    let _pool = pool!(4);
    let _dog = watchdog("shared_huge_pages_are_used_where_they_are", 60);
    let (hmm, device) = or_skip!(open(options()));
    let program = program(&device, INCREMENT);
    let flags = libc::MAP_SHARED | libc::MAP_HUGETLB;
    let map = Map::with(3 * HUGE, READ_WRITE, flags, -1);
    map.set(5, 5);
    for round in 1..=2 {
        increment(&device, &program, &map, 3 * HUGE * HALVES).unwrap();
        assert_eq!(half(&map, 3 * HUGE * HALVES - 1), round);
        assert_eq!(half(&map, 10), 5 + round);
        assert_eq!(device.stats().imported_now, 0);
    }
    drop((program, map));
    end(hmm, &device);
}

/// The program unmaps, moves and replaces what a kernel uses: it ends well or with an
/// error, uses the old pages or the new, and no others.
#[test]
fn what_goes_under_a_kernel_does_no_harm() {
    const PAGES: usize = 2048;
    const ROUNDS: u64 = 40;
    let _dog = watchdog("what_goes_under_a_kernel_does_no_harm", 200);
    let (hmm, device) = or_skip!(open(options()));
    let add = program(&device, INCREMENT);
    let mut rng = Rng::new(seed());
    let bystander = Map::with(16, READ_WRITE, libc::MAP_SHARED, -1);
    bystander.fill(9);
    let (mut well, mut errors) = (0, 0);
    for round in 0..ROUNDS {
        let (file, other) = (memfd(PAGES), memfd(PAGES));
        let map = shared(&file, PAGES);
        let (at, begun) = (map.page(0), AtomicBool::new(false));
        let wait = Duration::from_micros(rng.below(20_000) as u64);
        let count = u32::try_from(PAGES * HALVES).unwrap();
        let (push, groups) = (push(&add, &[at], &[count]), count / 64);
        std::thread::scope(|scope| {
            let kernel = scope.spawn(|| {
                begun.store(true, Ordering::SeqCst);
                let first = device.launch(&add, [groups, 1, 1], &push);
                first.and_then(|_| device.launch(&add, [groups, 1, 1], &push))
            });
            while !begun.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            std::thread::sleep(wait);
            match round % 4 {
                0 => drop(map),
                1 => drop(map.remap(PAGES, libc::MREMAP_MAYMOVE, None)),
                2 => {
                    map.unmap_part(100, 700);
                    map.leak();
                }
                _ => {
                    // SAFETY: the test's own mapping is replaced.
                    unsafe {
                        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
                        let (fd, len) = (other.as_raw_fd(), PAGES * PAGE);
                        let placed = libc::mmap(at.cast(), len, READ_WRITE, flags, fd, 0);
                        assert_eq!(placed, at.cast());
                    }
                    drop(map);
                }
            }
            match kernel.join().unwrap() {
                Ok(_) => well += 1,
                Err(LaunchVulkanError::Kernel(_)) => errors += 1,
                Err(error) => panic!("{error}"),
            }
        });
        assert_eq!(device.stats().imported_now, 0);
        let (old, new) = (shared(&file, PAGES), shared(&other, PAGES));
        for index in (0..PAGES * HALVES).step_by(61) {
            let total = half(&old, index) + half(&new, index);
            assert!(total <= 2, "word {index}: {total}");
        }
        bystander.check(9);
    }
    println!("{well} ended well, {errors} with an error");
    drop((add, bystander));
    end(hmm, &device);
}

/// The engine takes memory away from a device that is removed while it uses it.
#[test]
fn a_device_that_is_removed_lets_go() {
    const PAGES: usize = 4096;
    let _dog = watchdog("a_device_that_is_removed_lets_go", 100);
    for wait_ms in [1, 5, 20] {
        let (hmm, device) = or_skip!(open(options()));
        let add = program(&device, INCREMENT);
        let file = memfd(PAGES);
        let map = shared(&file, PAGES);
        std::thread::scope(|scope| {
            scope.spawn(
                || {
                    while increment(&device, &add, &map, PAGES * HALVES).is_ok() {}
                },
            );
            std::thread::sleep(Duration::from_millis(wait_ms));
            assert!(device.remove().unwrap());
        });
        assert_eq!(device.stats().imported_now, 0);
        let first = half(&map, 0);
        for index in (0..PAGES * HALVES).step_by(61) {
            assert!(first - half(&map, index) <= 1, "word {index}");
        }
        drop(add);
        hmm.shutdown().unwrap();
    }
}
