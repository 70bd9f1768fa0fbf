//! Files and shared memory: they stay, devices use them in place, and whatever
//! becomes of the file is an error of the kernel on the device at most.
mod common;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{
    Map, PAGE, WORDS, adds_up, all_free, engine, helper, nothing_staged, pattern, role, run,
    watchdog,
};
use hmm::{Hmm, KernelError, LaunchError, Pointer, SoftwareDevice, StayReason};

const PAGES: usize = 1200;

/// A file without a name, of whole pages with a pattern.
fn file(pages: usize, seed: u64) -> File {
    let file = tempfile();
    write_pattern(&file, pages, seed);
    file
}

fn write_pattern(file: &File, pages: usize, seed: u64) {
    let bytes: Vec<u8> = (0..pages * WORDS)
        .flat_map(|index| pattern(seed, index).to_ne_bytes())
        .collect();
    file.write_all_at(&bytes, 0).expect("a file is written");
}

fn tempfile() -> File {
    let path = std::env::temp_dir().join(format!("hmm-in-place-{}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .expect("a file in the folder for temporary files");
    std::fs::remove_file(&path).expect("the file can be removed");
    file
}

fn memfd(pages: usize, seed: u64) -> File {
    // SAFETY: a new descriptor, given to its owner at once.
    let file = unsafe {
        let fd = libc::memfd_create(c"in-place".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create");
        File::from_raw_fd(fd)
    };
    file.set_len((pages * PAGE) as u64).unwrap();
    Map::with(pages, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd()).fill(seed);
    file
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn sum_by_device(device: &SoftwareDevice, map: &Map, pages: usize) -> Result<u64, LaunchError> {
    let (first, total) = (Pointer::<u64>::new(map.word(0)), AtomicU64::new(0));
    device.launch(1, |context, _| {
        let mut part = [0u64; WORDS];
        let mut sum = 0u64;
        for page in 0..pages {
            context.read_slice(first.at(page * WORDS), &mut part)?;
            sum = part.iter().fold(sum, |sum, &word| sum.wrapping_add(word));
        }
        total.store(sum, Ordering::Relaxed);
        Ok(())
    })?;
    Ok(total.into_inner())
}

fn sum_of(pages: usize, seed: u64) -> u64 {
    (0..pages * WORDS).fold(0, |sum, index| sum.wrapping_add(pattern(seed, index)))
}

fn kernel_error(error: &LaunchError) -> &KernelError {
    match error {
        LaunchError::Kernel { error, .. } => error,
        other => panic!("no error of the kernel: {other}"),
    }
}

fn end(hmm: Hmm, device: &SoftwareDevice) {
    all_free(&hmm, device);
    nothing_staged(&hmm);
    hmm.shutdown().unwrap();
}

#[test]
fn files_and_shared_memory_are_used_where_they_are() {
    let _dog = watchdog("files_and_shared_memory_are_used_where_they_are", 60);
    let (hmm, device) = engine(16);
    let (on_disk, in_memory) = (file(PAGES, 1), memfd(PAGES, 1));
    let kinds = [
        (
            "file, shared",
            &on_disk,
            libc::MAP_SHARED,
            StayReason::FileBacked,
        ),
        (
            "file, private",
            &on_disk,
            libc::MAP_PRIVATE,
            StayReason::FileBacked,
        ),
        (
            "memfd, shared",
            &in_memory,
            libc::MAP_SHARED,
            StayReason::Shared,
        ),
        (
            "memfd, private",
            &in_memory,
            libc::MAP_PRIVATE,
            StayReason::Shared,
        ),
    ];
    for (what, file, flags, reason) in kinds {
        let map = Map::with(PAGES, READ_WRITE, flags, file.as_raw_fd());
        let report = hmm.migrate(map.range(), device.id()).unwrap();
        adds_up(&report, map.range());
        assert!(
            report.moved.get() == 0 && report.stayed.iter().all(|stay| stay.reason == reason),
            "{what}: {report}"
        );
        let faults = hmm.statistics().device_faults;
        assert_eq!(
            sum_by_device(&device, &map, PAGES).unwrap(),
            sum_of(PAGES, 1),
            "{what}"
        );
        let faults = hmm.statistics().device_faults - faults;
        assert!(faults < 16, "{what}: {faults} faults for {PAGES} pages");
        // A store, which reaches the file if the mapping is shared.
        let (word, value) = (700 * WORDS + 5, 0xfeed);
        let at = Pointer::<u64>::new(map.word(word));
        device
            .launch(1, |context, _| context.store(at.get(), value))
            .unwrap();
        assert_eq!(map.get(word), value, "{what}");
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, word as u64 * 8).unwrap();
        let in_file = u64::from_ne_bytes(bytes);
        if flags == libc::MAP_SHARED {
            assert_eq!(in_file, value, "{what}");
            map.set(word, pattern(1, word));
        } else {
            assert_eq!(in_file, pattern(1, word), "{what}");
        }
    }
    let map = Map::with(PAGES, READ_WRITE, libc::MAP_SHARED, -1);
    map.fill(2);
    assert_eq!(
        sum_by_device(&device, &map, PAGES).unwrap(),
        sum_of(PAGES, 2)
    );
    drop(map);
    end(hmm, &device);
}

/// What is behind the end of a file is an error, and nothing else: also when it
/// is cut while kernels read it.
#[test]
fn a_truncated_file_is_an_error_of_the_kernel() {
    let _dog = watchdog("a_truncated_file_is_an_error_of_the_kernel", 60);
    let (hmm, device) = engine(16);
    for file in [file(PAGES, 3), memfd(PAGES, 3)] {
        let map = Map::with(PAGES, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd());
        assert_eq!(
            sum_by_device(&device, &map, PAGES).unwrap(),
            sum_of(PAGES, 3)
        );
        file.set_len(600 * PAGE as u64).unwrap();
        assert_eq!(sum_by_device(&device, &map, 600).unwrap(), sum_of(600, 3));
        let error = sum_by_device(&device, &map, PAGES).unwrap_err();
        let behind = hmm::VirtAddr::new(map.page(600) as u64);
        assert_eq!(kernel_error(&error), &KernelError::Bus { address: behind });
        println!("{error}");
        let at = Pointer::<u64>::new(map.word(700 * WORDS));
        for what in 0..3 {
            let error = device
                .launch(1, |context, _| match what {
                    0 => context.store(at.get(), 1),
                    1 => context.fetch_add(at.get(), 1).map(drop),
                    _ => context.load(at.get()).map(drop),
                })
                .unwrap_err();
            assert!(
                matches!(kernel_error(&error), KernelError::Bus { .. }),
                "{error}"
            );
        }
        // It grows again: zeros where it had been cut.
        file.set_len((PAGES * PAGE) as u64).unwrap();
        assert_eq!(sum_by_device(&device, &map, PAGES).unwrap(), sum_of(600, 3));
    }
    // A race: each run ends well or with an error, and never with the process.
    let file = file(PAGES, 4);
    let map = Map::with(PAGES, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                file.set_len(PAGE as u64 * 10).unwrap();
                file.set_len((PAGES * PAGE) as u64).unwrap();
            }
        });
        let mut errors = 0;
        for _ in 0..300 {
            match sum_by_device(&device, &map, PAGES) {
                Ok(_) => {}
                Err(error) => {
                    assert!(
                        matches!(kernel_error(&error), KernelError::Bus { .. }),
                        "{error}"
                    );
                    errors += 1;
                }
            }
        }
        println!("{errors} of 300 met the end of the file");
        stop.store(true, Ordering::Relaxed);
    });
    drop(map);
    end(hmm, &device);
}

#[test]
fn a_hole_in_a_file_reads_as_zeros() {
    let _dog = watchdog("a_hole_in_a_file_reads_as_zeros", 60);
    let (hmm, device) = engine(16);
    let file = memfd(PAGES, 5);
    let map = Map::with(PAGES, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd());
    let right = sum_of(PAGES, 5);
    assert_eq!(sum_by_device(&device, &map, PAGES).unwrap(), right);
    let (from, bytes) = (100 * PAGE, 50 * PAGE);
    let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a file of this test's own.
    let done = unsafe { libc::fallocate(file.as_raw_fd(), hole, from as i64, bytes as i64) };
    assert_eq!(done, 0);
    let lost = (100 * WORDS..150 * WORDS).fold(0, |sum: u64, i| sum.wrapping_add(pattern(5, i)));
    assert_eq!(
        sum_by_device(&device, &map, PAGES).unwrap(),
        right.wrapping_sub(lost)
    );
    drop(map);
    end(hmm, &device);
}

/// Memory is unmapped under a kernel that uses it in place.
#[test]
fn a_mapping_that_goes_is_an_error_of_the_kernel() {
    let _dog = watchdog("a_mapping_that_goes_is_an_error_of_the_kernel", 60);
    let (hmm, device) = engine(16);
    let file = memfd(PAGES, 6);
    for _ in 0..20 {
        let map = Map::with(PAGES, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd());
        let (first, reading) = (Pointer::<u64>::new(map.word(0)), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                device.launch(1, |context, _| {
                    loop {
                        for page in 0..PAGES {
                            context.load(first.at(page * WORDS))?;
                        }
                        reading.store(true, Ordering::Relaxed);
                    }
                })
            });
            while !reading.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            drop(map);
            let error = reader.join().unwrap().unwrap_err();
            assert!(
                format!("{:?}", kernel_error(&error)).contains("NotMapped"),
                "{error}"
            );
        });
    }
    end(hmm, &device);
}

/// Runs a command; what it said if it failed.
fn command(line: &[&str]) -> Result<(), String> {
    match Command::new(line[0]).args(&line[1..]).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{line:?}: {} {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Err(format!("{line:?}: {error}")),
    }
}

/// A file system is unmounted under a device that works on one of its files, and
/// its disk breaks: the device goes on with what is there, and what cannot be read
/// is an error of its kernel. In a process with mounts of its own.
#[test]
fn a_mount_that_goes_is_an_error_of_the_kernel_at_most() {
    const NAME: &str = "a_mount_that_goes_is_an_error_of_the_kernel_at_most";
    let _dog = watchdog(NAME, 60);
    if role().as_deref() == Some("mounts") {
        mounts_go();
        return;
    }
    // SAFETY: asks who this is.
    if unsafe { libc::geteuid() } != 0 {
        skip!("only root mounts file systems");
    }
    let (status, text) = run(helper(NAME, "mounts"), 50);
    print!("{text}");
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    if let Some(reason) = text
        .lines()
        .find_map(|line| line.strip_prefix("no mount: "))
    {
        skip!("{reason}");
    }
}

fn mounts_go() {
    // SAFETY: changes what this process sees as mounted, and nothing else.
    let apart = unsafe {
        let all = libc::MS_REC | libc::MS_PRIVATE;
        let (none, root) = (std::ptr::null(), c"/".as_ptr());
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(none, root, none, all, none.cast()) == 0
    };
    if !apart {
        let error = std::io::Error::last_os_error();
        println!("no mount: unshare(CLONE_NEWNS): {error}");
        return;
    }
    let folder = std::env::temp_dir().join(format!("hmm-mount-{}", std::process::id()));
    let image = folder.with_extension("image");
    std::fs::create_dir(&folder).expect("a folder");
    let (hmm, device) = engine(16);

    let at = folder.to_str().expect("a name");
    let mounted = command(&["mount", "-t", "tmpfs", "hmm-test", at]);
    if let Err(reason) = mounted.and_then(|()| tmpfs_goes(&device, at)) {
        println!("no mount: {reason}");
    }

    File::create(&image).unwrap().set_len(32 << 20).unwrap();
    let disk = image.to_str().expect("a name");
    let mounted = command(&["mkfs.ext4", "-q", "-F", disk])
        .and_then(|()| command(&["mount", "-o", "loop", disk, at]));
    if let Err(reason) = mounted.and_then(|()| disk_goes(&device, at, &image)) {
        println!("no mount: {reason}");
    }
    std::fs::remove_file(&image).unwrap();
    std::fs::remove_dir(&folder).unwrap();
    end(hmm, &device);
}

fn file_in(folder: &str, seed: u64) -> File {
    let path = std::path::Path::new(folder).join("file");
    let mut options = File::options();
    let options = options.read(true).write(true).create_new(true);
    let file = options.open(path).expect("a file");
    write_pattern(&file, PAGES, seed);
    file.sync_all().expect("a file is synced");
    file
}

fn tmpfs_goes(device: &SoftwareDevice, folder: &str) -> Result<(), String> {
    let file = file_in(folder, 9);
    let map = Map::with(PAGES, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd());
    assert_eq!(
        sum_by_device(device, &map, PAGES / 2).unwrap(),
        sum_of(PAGES / 2, 9)
    );
    command(&["umount", "-l", folder])?;
    assert_eq!(
        sum_by_device(device, &map, PAGES).unwrap(),
        sum_of(PAGES, 9)
    );
    let word = Pointer::<u64>::new(map.word(7));
    device
        .launch(1, |context, _| context.store(word.get(), 1))
        .unwrap();
    let mut now = [0; 8];
    file.read_exact_at(&mut now, 7 * 8).unwrap();
    assert_eq!(u64::from_ne_bytes(now), 1);
    Ok(())
}

fn disk_goes(device: &SoftwareDevice, folder: &str, image: &std::path::Path) -> Result<(), String> {
    let file = file_in(folder, 10);
    let map = Map::with(PAGES, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd());
    assert_eq!(
        sum_by_device(device, &map, PAGES).unwrap(),
        sum_of(PAGES, 10)
    );
    // The first half has to be read again, and the disk is not there any more.
    let (half, fd) = (PAGES / 2, file.as_raw_fd());
    assert!(map.advise(0, half, libc::MADV_DONTNEED));
    // SAFETY: advice on a file of this test's own.
    let dropped =
        unsafe { libc::posix_fadvise(fd, 0, (half * PAGE) as i64, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(dropped, 0);
    command(&["umount", "-l", folder])?;
    let disk = File::options().write(true).open(image).unwrap();
    disk.set_len(0).unwrap();
    let error = sum_by_device(device, &map, PAGES).unwrap_err();
    println!("{error}");
    assert!(
        matches!(kernel_error(&error), KernelError::Bus { .. }),
        "{error}"
    );
    // What is in the page cache is there.
    let (first, sum) = (
        Pointer::<u64>::new(map.word(half * WORDS)),
        AtomicU64::new(0),
    );
    device
        .launch(half, |context, page| {
            sum.fetch_add(context.load(first.at(page * WORDS))?, Ordering::Relaxed);
            Ok(())
        })
        .unwrap();
    let right = (half..PAGES).fold(0u64, |sum, page| {
        sum.wrapping_add(pattern(10, page * WORDS))
    });
    assert_eq!(sum.into_inner(), right);
    Ok(())
}

static SEEN: AtomicU64 = AtomicU64::new(0);

/// The program's own SIGBUS is the program's: with a handler of its own, before
/// and after kernels ran, or with none.
#[test]
fn the_programs_own_signals_stay_the_programs() {
    let _dog = watchdog("the_programs_own_signals_stay_the_programs", 60);
    // Reading behind the end of a file ends the process, as it should.
    if role().as_deref() == Some("dies") {
        let (_hmm, device) = engine(16);
        let file = file(4, 7);
        let map = Map::with(4, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd());
        file.set_len(0).unwrap();
        assert!(sum_by_device(&device, &map, 4).is_err());
        println!("read {}", map.get(0));
        std::process::exit(0);
    }
    let (status, text) = run(
        helper("the_programs_own_signals_stay_the_programs", "dies"),
        30,
    );
    let status = status.expect("the helper ends");
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, Some(libc::SIGBUS), "{status}: {text}");

    extern "C" fn count(signal: i32) {
        SEEN.fetch_add(1, Ordering::SeqCst);
        assert_eq!(signal, libc::SIGBUS);
    }
    let (hmm, device) = engine(16);
    let file = file(4, 8);
    let map = Map::with(4, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd());
    assert!(sum_by_device(&device, &map, 4).is_ok());
    // SAFETY: the handler only counts; the signal is sent, not met.
    unsafe { libc::signal(libc::SIGBUS, count as *const () as usize) };
    file.set_len(0).unwrap();
    for sent in 1..4 {
        assert!(sum_by_device(&device, &map, 4).is_err());
        assert_eq!(
            SEEN.load(Ordering::SeqCst),
            sent - 1,
            "a kernel's is not its"
        );
        // SAFETY: as above.
        unsafe { libc::raise(libc::SIGBUS) };
        assert_eq!(SEEN.load(Ordering::SeqCst), sent);
    }
    drop(map);
    end(hmm, &device);
}
