//! Files on persistent memory: a mapping of one is the memory itself (DAX), with
//! no page cache in between. It stays where it is, and devices work on it there.
//!
//! `HMM_DAX_DIRS` names folders on file systems that are mounted with dax, with
//! colons between them. `cargo xtask vm-test` makes such ones in a virtual
//! machine; without any, these tests skip themselves.
mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{
    HUGE, Map, PAGE, WORDS, adds_up, all_free, engine, nothing_staged, on_device, pattern, send,
    watchdog,
};
use hmm::{
    Hmm, KernelError, LaunchError, MappedMemory, Pointer, SoftwareDevice, StayReason, VirtAddr,
};

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Some pages; whole huge pages; huge pages and some.
const SIZES_PAGES: [usize; 3] = [5, 2 * HUGE, HUGE + 7];

fn folders() -> Vec<PathBuf> {
    let given = std::env::var("HMM_DAX_DIRS").unwrap_or_default();
    let folders = given.split(':').filter(|folder| !folder.is_empty());
    folders.map(PathBuf::from).collect()
}

macro_rules! folders {
    () => {{
        let folders = folders();
        if folders.is_empty() {
            skip!("HMM_DAX_DIRS names no folders on persistent memory");
        }
        folders
    }};
}

/// A file without a name; it is a hole as yet.
fn hole(folder: &Path, pages: usize) -> File {
    let path = folder.join(format!("hmm-dax-{}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    std::fs::remove_file(&path).expect("the file can be removed");
    file.set_len((pages * PAGE) as u64).expect("a size");
    file
}

/// A file of pages with a pattern.
fn file(folder: &Path, pages: usize, seed: u64) -> File {
    let file = hole(folder, pages);
    // At once, so that the file system can give it room that lies together.
    // SAFETY: a file of this test's own.
    let failed = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, (pages * PAGE) as i64) };
    assert_eq!(
        failed,
        0,
        "no room for {pages} pages in {}",
        folder.display()
    );
    file.write_all_at(&bytes(pages, seed), 0).expect("a write");
    file
}

fn bytes(pages: usize, seed: u64) -> Vec<u8> {
    (0..pages * WORDS)
        .flat_map(|index| pattern(seed, index).to_ne_bytes())
        .collect()
}

/// A mapping of the file, which must be the persistent memory itself.
fn map(file: &File, pages: usize, protection: i32, flags: i32) -> Map {
    let map = Map::with(pages, protection, flags, file.as_raw_fd());
    assert!(
        about(&map).dax,
        "this file system has no DAX: {:?}",
        about(&map)
    );
    map
}

fn about(map: &Map) -> MappedMemory {
    let start = VirtAddr::of(map.at());
    let memory = hmm::memory_of(None).expect("this process's memory");
    memory
        .into_iter()
        .find(|mapped| mapped.range.contains(start))
        .expect("the mapping")
}

/// What read(2) finds in the file.
fn word_in(file: &File, index: usize) -> u64 {
    let mut bytes = [0; 8];
    let at = (index * 8) as u64;
    file.read_exact_at(&mut bytes, at).expect("a read");
    u64::from_ne_bytes(bytes)
}

/// A migration that leaves all where and as it is, and says why.
fn stays(hmm: &Hmm, device: &SoftwareDevice, map: &Map, reason: StayReason) {
    let free = device.free_memory();
    let report = hmm.migrate(map.range(), device.id()).expect("a report");
    adds_up(&report, map.range());
    assert_eq!(report.stayed_pages, map.range().pages(), "{report}");
    assert!(
        report.stayed.iter().all(|stay| stay.reason == reason),
        "{report}"
    );
    assert_eq!(on_device(hmm, map.range(), device), 0);
    assert_eq!(device.free_memory(), free);
}

/// The device adds one to the first word of each page, and sums up what was there.
fn add_by_device(device: &SoftwareDevice, map: &Map) -> u64 {
    let (first, sum) = (Pointer::<u64>::new(map.word(0)), AtomicU64::new(0));
    device
        .launch(map.pages(), |context, page| {
            let at = first.at(page * WORDS);
            let value = context.load(at)?;
            context.store(at, value.wrapping_add(1))?;
            sum.fetch_add(value, Ordering::Relaxed);
            Ok(())
        })
        .expect("the device works in place");
    sum.into_inner()
}

fn first_words(pages: usize, seed: u64) -> u64 {
    (0..pages).fold(0, |sum, page| sum.wrapping_add(pattern(seed, page * WORDS)))
}

fn end(hmm: Hmm, device: &SoftwareDevice) {
    all_free(&hmm, device);
    nothing_staged(&hmm);
    hmm.shutdown().unwrap();
}

#[test]
fn a_device_works_on_persistent_memory_in_place() {
    let folders = folders!();
    let _dog = watchdog("a_device_works_on_persistent_memory_in_place", 60);
    let (hmm, device) = engine(16);
    for (folder, pages) in pairs(&folders) {
        let file = file(folder, pages, 1);
        let map = map(&file, pages, READ_WRITE, libc::MAP_SHARED);
        println!("{}: {pages} pages at {:?}", folder.display(), map.at());
        stays(&hmm, &device, &map, StayReason::FileBacked);
        map.check(1);
        assert_eq!(add_by_device(&device, &map), first_words(pages, 1));
        // SAFETY: the whole mapping.
        let synced = unsafe { libc::msync(map.at().cast(), map.bytes(), libc::MS_SYNC) };
        assert_eq!(synced, 0, "{}", std::io::Error::last_os_error());
        // To read(2), and to others that map the file.
        let other = self::map(&file, pages, libc::PROT_READ, libc::MAP_SHARED);
        for index in 0..pages * WORDS {
            let added = u64::from(index % WORDS == 0);
            assert_eq!(other.get(index), pattern(1, index).wrapping_add(added));
        }
        for page in 0..pages {
            let index = page * WORDS;
            assert_eq!(word_in(&file, index), pattern(1, index).wrapping_add(1));
        }
        // And what write(2) writes is there for the device.
        file.write_all_at(&bytes(pages, 2), 0).expect("a write");
        assert_eq!(add_by_device(&device, &map), first_words(pages, 2));
    }
    end(hmm, &device);
}

fn pairs(folders: &[PathBuf]) -> impl Iterator<Item = (&Path, usize)> {
    folders
        .iter()
        .flat_map(|folder| SIZES_PAGES.map(|pages| (folder.as_path(), pages)))
}

#[test]
fn a_private_mapping_keeps_changes_from_the_file() {
    let folders = folders!();
    let _dog = watchdog("a_private_mapping_keeps_changes_from_the_file", 60);
    let (hmm, device) = engine(16);
    for (folder, pages) in pairs(&folders) {
        let file = file(folder, pages, 3);
        let map = map(&file, pages, READ_WRITE, libc::MAP_PRIVATE);
        // Some pages are the program's own copies, the others the file's.
        map.fill_part(1, 2, 3);
        stays(&hmm, &device, &map, StayReason::FileBacked);
        map.check(3);
        assert_eq!(add_by_device(&device, &map), first_words(pages, 3));
        // By now all are copies.
        stays(&hmm, &device, &map, StayReason::FileBacked);
        for page in 0..pages {
            let (index, was) = (page * WORDS, pattern(3, page * WORDS));
            assert_eq!(map.get(index), was.wrapping_add(1));
            assert_eq!(word_in(&file, index), was);
        }
    }
    end(hmm, &device);
}

#[test]
fn holes_are_filled_by_the_device() {
    let folders = folders!();
    let _dog = watchdog("holes_are_filled_by_the_device", 60);
    let (hmm, device) = engine(16);
    for (folder, pages) in pairs(&folders) {
        let file = hole(folder, pages);
        let map = map(&file, pages, READ_WRITE, libc::MAP_SHARED);
        stays(&hmm, &device, &map, StayReason::FileBacked);
        assert_eq!(add_by_device(&device, &map), 0);
        for page in 0..pages {
            assert_eq!(word_in(&file, page * WORDS), 1);
            assert_eq!(word_in(&file, page * WORDS + 1), 0);
        }
    }
    end(hmm, &device);
}

/// Sums up the first word of each page, in order; the error that ends it.
fn sum_by_device(device: &SoftwareDevice, map: &Map, pages: usize) -> Result<u64, LaunchError> {
    let (first, sum) = (Pointer::<u64>::new(map.word(0)), AtomicU64::new(0));
    device.launch(1, |context, _| {
        for page in 0..pages {
            sum.fetch_add(context.load(first.at(page * WORDS))?, Ordering::Relaxed);
        }
        Ok(())
    })?;
    Ok(sum.into_inner())
}

/// Whether a kernel met the end of a file, and where; no other error counts.
fn end_met(error: &LaunchError) -> VirtAddr {
    match error {
        LaunchError::Kernel {
            error: KernelError::Bus { address },
            ..
        } => *address,
        other => panic!("not the end of a file: {other}"),
    }
}

/// What is behind the end of a file is an error of the kernel, and never what has
/// been there, nor anything for the process; also when the file is cut while
/// kernels read it.
#[test]
fn a_file_that_is_cut_is_an_error_of_the_kernel() {
    let folders = folders!();
    let _dog = watchdog("a_file_that_is_cut_is_an_error_of_the_kernel", 120);
    let (hmm, device) = engine(16);
    for (folder, pages) in pairs(&folders) {
        let file = file(folder, pages, 8);
        let map = map(&file, pages, READ_WRITE, libc::MAP_SHARED);
        assert_eq!(add_by_device(&device, &map), first_words(pages, 8));
        let left = pages - 3;
        file.set_len((left * PAGE) as u64).expect("a cut");
        let behind = VirtAddr::of(map.word(left * WORDS));
        assert_eq!(
            end_met(&sum_by_device(&device, &map, pages).unwrap_err()),
            behind
        );
        let at = Pointer::<u64>::new(map.word(left * WORDS));
        let stored = device.launch(1, |context, _| context.store(at.get(), 1));
        assert_eq!(end_met(&stored.unwrap_err()), behind);
        // It grows again: zeros where it was cut.
        file.set_len((pages * PAGE) as u64).expect("more room");
        let right = first_words(left, 8).wrapping_add(left as u64);
        assert_eq!(sum_by_device(&device, &map, pages).unwrap(), right);
        // A hole of zeros, in the middle.
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (fd, page) = (file.as_raw_fd(), PAGE as i64);
        // SAFETY: a file of this test's own.
        let punched = unsafe { libc::fallocate(fd, hole, page, page) };
        assert_eq!(punched, 0, "{}", std::io::Error::last_os_error());
        let gone = pattern(8, WORDS).wrapping_add(1);
        assert_eq!(
            sum_by_device(&device, &map, pages).unwrap(),
            right.wrapping_sub(gone)
        );

        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for length in [left, pages] {
                        file.set_len((length * PAGE) as u64).expect("a length");
                    }
                }
            });
            let runs = (0..50).map(|_| sum_by_device(&device, &map, pages));
            let errors = runs.filter_map(Result::err).map(|error| end_met(&error));
            let met = errors.inspect(|&at| assert!(at >= behind, "{at}")).count();
            println!("{met} of 50 met the end of the file");
            stop.store(true, Ordering::Relaxed);
        });
    }
    end(hmm, &device);
}

#[test]
fn what_is_mapped_to_be_read_is_not_written_by_the_device() {
    let folders = folders!();
    let _dog = watchdog("what_is_mapped_to_be_read_is_not_written", 60);
    let (hmm, device) = engine(16);
    for folder in &folders {
        let file = file(folder, 4, 4);
        let map = map(&file, 4, libc::PROT_READ, libc::MAP_SHARED);
        stays(&hmm, &device, &map, StayReason::FileBacked);
        let first = Pointer::<u64>::new(map.word(0));
        let written = device.launch(4, |context, page| context.store(first.at(page * WORDS), 0));
        println!("{}", written.expect_err("read-only memory was written"));
        let sum = AtomicU64::new(0);
        device
            .launch(4, |context, page| {
                sum.fetch_add(context.load(first.at(page * WORDS))?, Ordering::Relaxed);
                Ok(())
            })
            .unwrap();
        assert_eq!(sum.into_inner(), first_words(4, 4));
        map.check(4);
    }
    end(hmm, &device);
}

#[test]
fn the_cpu_and_the_device_count_together() {
    const ROUNDS: u64 = 2000;
    let folders = folders!();
    let _dog = watchdog("the_cpu_and_the_device_count_together", 60);
    let (hmm, device) = engine(16);
    for folder in &folders {
        let file = hole(folder, 1);
        let map = map(&file, 1, READ_WRITE, libc::MAP_SHARED);
        let counter = Pointer::<u64>::new(map.word(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: an aligned word of the mapping, used as an atomic by all.
                let counter = unsafe { AtomicU64::from_ptr(counter.get()) };
                for _ in 0..ROUNDS {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
            device
                .launch(2, |context, _| {
                    for _ in 0..ROUNDS {
                        context.fetch_add(counter.get(), 1)?;
                    }
                    Ok(())
                })
                .unwrap();
        });
        assert_eq!(word_in(&file, 0), 3 * ROUNDS);
    }
    end(hmm, &device);
}

#[test]
fn a_device_copies_between_its_memory_and_a_file() {
    let folders = folders!();
    let _dog = watchdog("a_device_copies_between_its_memory_and_a_file", 60);
    let (hmm, device) = engine(16);
    for (folder, pages) in pairs(&folders) {
        let file = hole(folder, pages);
        let map = map(&file, pages, READ_WRITE, libc::MAP_SHARED);
        let memory = Map::new(pages);
        memory.fill(6);
        send(&hmm, memory.range(), &device);
        let from = Pointer::<u64>::new(memory.word(0));
        let to = Pointer::<u64>::new(map.word(0));
        device
            .launch(pages, |context, page| {
                for index in page * WORDS..(page + 1) * WORDS {
                    let value = context.load(from.at(index))?;
                    context.store(to.at(index), value)?;
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(
            on_device(&hmm, memory.range(), &device),
            pages as u64,
            "the device reads what it has"
        );
        map.check(6);
        memory.check(6);
        assert!((0..pages).all(|page| word_in(&file, page * WORDS) == pattern(6, page * WORDS)));
    }
    end(hmm, &device);
}

#[test]
fn a_device_writes_where_no_msync_is_needed() {
    let folders = folders!();
    let _dog = watchdog("a_device_writes_where_no_msync_is_needed", 60);
    let (hmm, device) = engine(16);
    let mut offered = false;
    for folder in &folders {
        let file = file(folder, HUGE, 7);
        let flags = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
        // SAFETY: a new mapping, wherever the kernel likes.
        let at = unsafe {
            let (bytes, fd) = (HUGE * PAGE, file.as_raw_fd());
            libc::mmap(std::ptr::null_mut(), bytes, READ_WRITE, flags, fd, 0)
        };
        if at == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            println!("{}: no MAP_SYNC: {error}", folder.display());
            continue;
        }
        offered = true;
        let map = Map::adopt(at.cast(), HUGE);
        assert!(about(&map).dax);
        stays(&hmm, &device, &map, StayReason::FileBacked);
        assert_eq!(add_by_device(&device, &map), first_words(HUGE, 7));
        assert_eq!(word_in(&file, 0), pattern(7, 0).wrapping_add(1));
    }
    end(hmm, &device);
    if !offered {
        skip!("no folder of HMM_DAX_DIRS offers MAP_SYNC");
    }
}
