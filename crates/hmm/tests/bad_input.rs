//! Bad input gets a clear error and changes nothing; memory that cannot move
//! stays, with its reason; every report adds up.
mod common;

use common::{
    AnyDevice, Kind, Map, Operation, PAGE, WORDS, Work, add, adds_up, engine, helper, open,
    pattern, role, run, send, watchdog,
};
use hmm::{
    ByteCount, DeviceId, Error, Hmm, PageCount, PageRange, RangeError, Report, SoftwareOptions,
    StayReason, VirtAddr,
};

fn only(report: &Report, reason: StayReason) -> bool {
    report.moved.get() == 0
        && report.already.get() == 0
        && report.stayed.iter().all(|stay| stay.reason == reason)
}

#[test]
fn numbers_that_name_no_memory_are_refused() {
    let _dog = watchdog("numbers_that_name_no_memory_are_refused", 60);
    let (hmm, device) = engine(4);
    let at = VirtAddr::new;
    assert!(matches!(PageRange::new(at(0), 4096), Err(RangeError::Null)));
    assert!(matches!(
        PageRange::new(at(4096), 0),
        Err(RangeError::Empty { .. })
    ));
    assert!(matches!(
        PageRange::new(at(4097), 4096),
        Err(RangeError::Unaligned { .. })
    ));
    assert!(matches!(
        PageRange::new(at(4096), 4097),
        Err(RangeError::Unaligned { .. })
    ));
    assert!(matches!(
        PageRange::new(at(u64::MAX - 4095), 8192),
        Err(RangeError::Overflow { .. })
    ));
    assert!(matches!(
        PageRange::new(at(0xffff_8000_0000_0000), 4096),
        Err(RangeError::Kernel { .. })
    ));
    let raw = |address: usize, len: usize| {
        std::ptr::slice_from_raw_parts(std::ptr::with_exposed_provenance::<u8>(address), len)
    };
    let id = device.id();
    assert!(matches!(
        hmm.migrate(raw(0, 8192), id),
        Err(Error::Range(RangeError::Null))
    ));
    assert!(matches!(
        hmm.migrate(raw(1 << 20, 0), id),
        Err(Error::Range(RangeError::Empty { .. }))
    ));
    assert!(matches!(
        hmm.migrate(raw(0xffff_8000_0000_0000, 8192), id),
        Err(Error::Range(RangeError::Kernel { .. }))
    ));
    assert!(matches!(
        hmm.migrate(raw(usize::MAX - 100, 8192), id),
        Err(Error::Range(RangeError::Overflow { .. }))
    ));
    let words =
        std::ptr::slice_from_raw_parts(std::ptr::with_exposed_provenance::<u64>(8), usize::MAX);
    assert!(matches!(hmm.migrate(words, id), Err(Error::Range(_))));
    let nothing: [u8; 0] = [];
    for result in [
        hmm.migrate(&nothing[..], id),
        hmm.evict(&nothing[..]),
        hmm.exclusive(&nothing[..], id),
    ] {
        let error = result.unwrap_err();
        assert!(
            matches!(error, Error::Range(RangeError::Empty { .. })),
            "{error}"
        );
    }
    assert!(hmm.residency(&nothing[..]).is_err());
    // A slice without a whole page moves nothing.
    let small = [1u8; 100];
    assert_eq!(hmm.migrate(&small[..], id).unwrap().total().get(), 0);
    assert_eq!(device.free_memory(), device.memory());
    hmm.shutdown().unwrap();
}

on_each!(unmapped_addresses_are_named_in_the_error: software, vulkan);
fn unmapped_addresses_are_named_in_the_error(kind: Kind) {
    let _dog = watchdog("unmapped_addresses_are_named_in_the_error", 60);
    let (hmm, device) = or_skip!(open(kind, 4));
    let range = PageRange::from_pages(VirtAddr::new(0x1000_0000), PageCount::new(3));
    let named = |result| matches!(result, Err(Error::NotMapped { range: named }) if named == range);
    assert!(named(hmm.migrate(range, device.id())));
    let exclusive = hmm.exclusive(range, device.id());
    if kind.works_in_place() {
        assert!(named(exclusive));
    } else {
        let refused = exclusive.unwrap_err();
        assert!(
            matches!(refused, Error::NotInPlace { device: named } if named == device.id()),
            "{refused}"
        );
    }
    // The whole of user space.
    let all = PageRange::new(VirtAddr::new(4096), (1 << 47) - 8192);
    println!("{all:?}");
    hmm.shutdown().unwrap();
}

#[test]
fn devices_that_are_gone_or_foreign_are_refused() {
    let _dog = watchdog("devices_that_are_gone_or_foreign_are_refused", 60);
    let (hmm, first) = engine(4);
    let map = Map::new(16);
    map.fill(1);
    for id in [DeviceId::new(7), DeviceId::new(15)] {
        assert!(
            matches!(hmm.migrate(map.range(), id), Err(Error::NoDevice { device }) if device == id)
        );
        assert!(hmm.prefetch(map.range(), id).is_err());
        assert!(hmm.exclusive(map.range(), id).is_err());
    }
    assert!(first.remove().unwrap());
    assert!(matches!(
        hmm.migrate(map.range(), first.id()),
        Err(Error::NoDevice { .. })
    ));
    assert_eq!(
        hmm.watched(map.range()).get(),
        0,
        "a refused request changed something"
    );
    map.check(1);
    assert!(
        hmm.add_software_device(SoftwareOptions::new(ByteCount::new(0)))
            .is_err()
    );
    assert!(
        hmm.add_software_device(SoftwareOptions::new(ByteCount::mib(1)).workers(0))
            .is_err()
    );
    assert!(
        hmm.add_software_device(SoftwareOptions::new(ByteCount::new(u64::MAX)))
            .is_err()
    );
    hmm.shutdown().unwrap();
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let bad = [
        Hmm::builder().handlers(0),
        Hmm::builder().handlers(1000),
        Hmm::builder().workers(0),
        Hmm::builder().fault_granule(PageCount::new(3)),
        Hmm::builder().fault_granule(PageCount::new(0)),
        Hmm::builder().device_granule(PageCount::new(1024)),
        Hmm::builder().staging_limit(ByteCount::new(0)),
    ];
    for builder in bad {
        let error = builder.open().unwrap_err();
        assert!(matches!(error, Error::Setting { .. }), "{error}");
    }
}

on_each!(more_than_the_device_holds_is_reported: software, vulkan);
fn more_than_the_device_holds_is_reported(kind: Kind) {
    let _dog = watchdog("more_than_the_device_holds_is_reported", 60);
    let (hmm, device) = or_skip!(open(kind, 1));
    let map = Map::new(1000);
    map.fill(2);
    let report = hmm.migrate(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    assert_eq!(report.moved.get(), 256);
    assert!(
        report
            .stayed
            .iter()
            .all(|stay| stay.reason == StayReason::NoDeviceMemory)
    );
    map.check(2);
    hmm.shutdown().unwrap();
}

on_each!(memory_of_another_userfaultfd_is_left_alone: software, vulkan);
fn memory_of_another_userfaultfd_is_left_alone(kind: Kind) {
    let _dog = watchdog("memory_of_another_userfaultfd_is_left_alone", 60);
    let (hmm, device) = or_skip!(open(kind, 4));
    let map = Map::new(64);
    map.fill(3);
    #[repr(C)]
    struct Api {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    #[repr(C)]
    struct Register {
        start: u64,
        len: u64,
        mode: u64,
        ioctls: u64,
    }
    // SAFETY: plain system calls with structures as the kernel has them.
    let fd = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
        let fd = i32::try_from(fd).expect("a descriptor");
        if fd < 0 {
            skip!("userfaultfd(2): {}", std::io::Error::last_os_error());
        }
        let mut api = Api {
            api: 0xaa,
            features: 0,
            ioctls: 0,
        };
        assert_eq!(libc::ioctl(fd, 0xc018_aa3f, &raw mut api), 0);
        let start = map.page(16) as u64;
        let mut register = Register {
            start,
            len: 16 * PAGE as u64,
            mode: 1,
            ioctls: 0,
        };
        assert_eq!(libc::ioctl(fd, 0xc020_aa00, &raw mut register), 0);
        fd
    };
    let report = hmm.migrate(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    let foreign: u64 = report
        .stayed
        .iter()
        .filter(|stay| stay.reason == StayReason::ForeignUserfaultfd)
        .map(|stay| stay.range.pages().get())
        .sum();
    assert_eq!((foreign, report.moved.get()), (16, 48), "{report}");
    map.check(3);
    // SAFETY: this test's descriptor.
    unsafe { libc::close(fd) };
    send(&hmm, map.range(), &device);
    map.check(3);
    drop(map);
    hmm.shutdown().unwrap();
}

on_each!(files_and_shared_memory_stay_and_are_used_in_place: software, vulkan, waiting, named);
fn files_and_shared_memory_stay_and_are_used_in_place(kind: Kind) {
    let _dog = watchdog("files_and_shared_memory_stay_and_are_used_in_place", 60);
    let (hmm, device) = or_skip!(open(kind, 4));
    // SAFETY: a new file in memory.
    let fd = unsafe {
        let fd = libc::memfd_create(c"hmm-test".as_ptr(), 0);
        assert!(fd >= 0 && libc::ftruncate(fd, 8 * PAGE as i64) == 0);
        fd
    };
    let path = std::env::temp_dir().join(format!("hmm-test-{}", std::process::id()));
    std::fs::write(&path, vec![7u8; 8 * PAGE]).unwrap();
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let raw = std::os::fd::AsRawFd::as_raw_fd(&file);
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    for (what, map) in [
        ("shared anonymous", Map::with(8, rw, libc::MAP_SHARED, -1)),
        ("memfd", Map::with(8, rw, libc::MAP_SHARED, fd)),
        ("file, shared", Map::with(8, rw, libc::MAP_SHARED, raw)),
        ("file, private", Map::with(8, rw, libc::MAP_PRIVATE, raw)),
    ] {
        map.fill(4);
        let report = hmm.migrate(map.range(), device.id()).unwrap();
        adds_up(&report, map.range());
        println!("{what}: {report}");
        assert!(
            only(&report, StayReason::Shared) || only(&report, StayReason::FileBacked),
            "{what}: {report}"
        );
        map.check(4);
        let add = Work::new(Operation::Add, map.word(0)).pages(8).value(1);
        let result = device.run(add);
        let added = u64::from(kind.works_in_place());
        match result {
            Ok(()) => assert!(kind.works_in_place(), "{what}"),
            Err(error) => {
                println!("{what}: {error}");
                assert!(!kind.works_in_place(), "{what}: {error}");
                assert!(
                    error.is("Shared") || error.is("FileBacked"),
                    "{what}: {error}"
                );
            }
        }
        assert!(
            (0..8)
                .all(|page| map.get(page * WORDS) == pattern(4, page * WORDS).wrapping_add(added))
        );
    }
    std::fs::remove_file(path).unwrap();
    // SAFETY: this test's descriptor.
    unsafe { libc::close(fd) };
    hmm.shutdown().unwrap();
}

on_each!(locked_memory_stays: software, vulkan, waiting, named);
fn locked_memory_stays(kind: Kind) {
    let _dog = watchdog("locked_memory_stays", 60);
    let (hmm, device) = or_skip!(open(kind, 4));
    let map = Map::new(16);
    map.fill(5);
    // SAFETY: this test's memory.
    if unsafe { libc::mlock(map.at().cast(), map.bytes()) } != 0 {
        skip!("mlock: {}", std::io::Error::last_os_error());
    }
    let report = hmm.migrate(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    assert!(only(&report, StayReason::Locked), "{report}");
    map.check(5);
    let stored = device.run(Work::new(Operation::Store, map.word(0)).pages(16));
    match stored {
        Ok(()) => assert!((0..16).all(|page| map.get(page * WORDS) == page as u64)),
        Err(error) => {
            assert!(!kind.works_in_place(), "{error}");
            assert!(error.is("Locked") && error.is("Unreachable"), "{error}");
            map.check(5);
        }
    }
    hmm.shutdown().unwrap();
}

on_each!(memory_without_access_stays_and_read_only_memory_is_right: software, vulkan);
fn memory_without_access_stays_and_read_only_memory_is_right(kind: Kind) {
    let _dog = watchdog(
        "memory_without_access_stays_and_read_only_memory_is_right",
        60,
    );
    let (hmm, device) = or_skip!(open(kind, 4));
    let none = Map::new(16);
    none.fill(6);
    none.protect(0, 16, libc::PROT_NONE);
    let report = hmm.migrate(none.range(), device.id()).unwrap();
    adds_up(&report, none.range());
    assert!(only(&report, StayReason::NoAccess), "{report}");
    none.protect(0, 16, libc::PROT_READ);
    none.check(6);
    let map = Map::new(16);
    map.fill(7);
    map.protect(0, 16, libc::PROT_READ);
    let report = hmm.migrate(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    println!(
        "read-only: {report}; copied: {}",
        hmm.statistics().fallback_pages
    );
    assert!(report.moved.get() == 0 || hmm.statistics().fallback_pages >= report.moved.get());
    map.check(7);
    map.protect(0, 16, libc::PROT_READ | libc::PROT_WRITE);
    map.check(7);
    send(&hmm, map.range(), &device);
    map.check(7);
    drop((none, map));
    hmm.shutdown().unwrap();
}

on_each!(pages_shared_with_a_child_are_unshared_or_stay: software, vulkan);
fn pages_shared_with_a_child_are_unshared_or_stay(kind: Kind) {
    let _dog = watchdog("pages_shared_with_a_child_are_unshared_or_stay", 60);
    let (hmm, device) = or_skip!(open(kind, 4));
    let (map, go) = (
        Map::new(64),
        Map::with(1, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, -1),
    );
    map.fill(8);
    let child = common::fork(|| {
        while go.get(0) == 0 {
            std::hint::spin_loop();
        }
        i32::from(map.wrong(0, 64, 8).is_some())
    });
    let report = hmm.migrate(map.range(), device.id()).unwrap();
    adds_up(&report, map.range());
    println!("{report}");
    assert!(
        report
            .stayed
            .iter()
            .all(|stay| stay.reason == StayReason::SharedCow),
        "{report}"
    );
    map.check(8);
    map.fill(9);
    go.set(0, 1);
    assert_eq!(common::wait(child), 0);
    map.check(9);
    drop(map);
    hmm.shutdown().unwrap();
}

static mut STATIC: [u64; 64 * WORDS] = [0; 64 * WORDS];

on_each!(static_heap_and_stack_memory_survives_a_round_trip: software, vulkan, waiting, named);
fn static_heap_and_stack_memory_survives_a_round_trip(kind: Kind) {
    let _dog = watchdog("static_heap_and_stack_memory_survives_a_round_trip", 60);
    let (hmm, device) = or_skip!(open(kind, 16));
    let check = |what: &str, at: *mut u64, words: usize| {
        for index in 0..words {
            // SAFETY: the caller's memory, which nobody else uses.
            unsafe { at.wrapping_add(index).write_volatile(pattern(10, index)) };
        }
        let slice: *mut [u64] = std::ptr::slice_from_raw_parts_mut(at, words);
        let report = hmm.migrate(slice, device.id()).unwrap();
        println!("{what}: {report}");
        let range = PageRange::inside(VirtAddr::of(at.cast_const()), words as u64 * 8).unwrap();
        adds_up(&report, range.unwrap());
        let add = Work::new(Operation::Add, at).stride(64);
        let added = device.run(add.count(words / 64).value(1));
        // What stays is out of the reach of some.
        let fixed = what == ".bss" && !kind.works_in_place();
        match &added {
            Ok(()) => assert!(!fixed),
            Err(error) => assert!(fixed && error.is("EngineOwned"), "{what}: {error}"),
        }
        for index in 0..words {
            // SAFETY: as above.
            let seen = unsafe { at.wrapping_add(index).read_volatile() };
            let more = index % 64 == 0 && index / 64 < words / 64 && added.is_ok();
            let more = u64::from(more);
            assert_eq!(
                seen,
                pattern(10, index).wrapping_add(more),
                "{what}: word {index}"
            );
        }
    };
    check(".bss", (&raw mut STATIC).cast(), 64 * WORDS);
    let mut large = vec![0u64; 100 * WORDS];
    check("large heap block", large.as_mut_ptr(), large.len());
    let mut small: Vec<Vec<u64>> = (0..50).map(|_| vec![0; 2 * WORDS]).collect();
    for block in &mut small {
        check("small heap block", block.as_mut_ptr(), block.len());
    }
    let mut own = [0u64; 20 * WORDS];
    check("own stack", own.as_mut_ptr(), own.len());
    let (to, from) = std::sync::mpsc::channel();
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || {
        let mut words = [0u64; 20 * WORDS];
        to.send(hmm::Pointer::new(words.as_mut_ptr())).unwrap();
        wait.recv().unwrap();
        std::hint::black_box(&mut words);
    });
    check(
        "stack of another thread",
        from.recv().unwrap().get(),
        20 * WORDS,
    );
    done.send(()).unwrap();
    other.join().unwrap();
    drop((large, small));
    hmm.shutdown().unwrap();
}

/// Runs one helper of `limits_of_the_process_are_errors` and expects it to live.
fn limited(what: &str) {
    let (status, text) = run(helper("limits_of_the_process_are_errors", what), 60);
    println!("== {what}\n{text}");
    assert!(
        status.unwrap_or_else(|| panic!("{what}: hangs")).success(),
        "{what}: {status:?}\n{text}"
    );
}

fn limit(resource: libc::__rlimit_resource_t, soft: u64) {
    let mut value = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: plain system calls.
    unsafe {
        assert_eq!(libc::getrlimit(resource, &raw mut value), 0);
        value.rlim_cur = soft;
        assert_eq!(libc::setrlimit(resource, &raw const value), 0);
    }
}

#[test]
fn limits_of_the_process_are_errors() {
    let _dog = watchdog("limits_of_the_process_are_errors", 200);
    match role().as_deref() {
        None => {
            for what in ["descriptors", "memory-at-open", "memory-later", "mappings"] {
                limited(what);
            }
        }
        Some("descriptors") => {
            let map = Map::new(64);
            map.fill(1);
            for descriptors in 3..24 {
                limit(libc::RLIMIT_NOFILE, descriptors);
                match Hmm::open() {
                    Ok(hmm) => match hmm
                        .add_software_device(SoftwareOptions::new(ByteCount::mib(1)))
                    {
                        Ok(device) => {
                            drop(hmm.migrate(map.range(), device.id()));
                            // A fork needs a descriptor for the child, and waits
                            // while there is none (docs/limits.md).
                            limit(libc::RLIMIT_NOFILE, 1024);
                            let child = common::fork(|| i32::from(map.wrong(0, 64, 1).is_some()));
                            map.check(1);
                            assert_eq!(common::wait(child), 0, "{descriptors} descriptors");
                            hmm.shutdown().unwrap();
                        }
                        Err(error) => println!("{descriptors}: {error}"),
                    },
                    Err(error) => println!("{descriptors}: {error}"),
                }
            }
        }
        Some("memory-at-open") => {
            for mib in [100, 200, 500, 1000, 1500] {
                limit(libc::RLIMIT_AS, mib << 20);
                match Hmm::open() {
                    Ok(hmm) => {
                        match hmm.add_software_device(SoftwareOptions::new(ByteCount::mib(64))) {
                            Ok(_) => println!("{mib} MiB: enough"),
                            Err(error) => println!("{mib} MiB: {error}"),
                        }
                        hmm.shutdown().unwrap();
                    }
                    Err(error) => println!("{mib} MiB: {error}"),
                }
                limit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
            }
        }
        Some("memory-later") => {
            let (hmm, device) = engine(16);
            let map = Map::new(3000);
            map.fill(2);
            limit(libc::RLIMIT_AS, 1 << 20);
            let report = hmm.migrate(map.range(), device.id());
            limit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
            println!("{report:?}");
            if let Ok(report) = report {
                adds_up(&report, map.range());
            }
            limit(libc::RLIMIT_AS, 1 << 20);
            map.check(2);
            limit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
            hmm.shutdown().unwrap();
            map.check(2);
        }
        Some("mappings") => {
            let (hmm, device) = engine(16);
            let map = Map::new(3000);
            map.fill(3);
            // Every second page of a large mapping with another protection:
            // as many mappings as the process may have.
            let filler = Map::new(140_000);
            let mut count = 0;
            for page in (0..140_000).step_by(2) {
                // SAFETY: this test's memory.
                if unsafe { libc::mprotect(filler.page(page).cast(), PAGE, libc::PROT_READ) } != 0 {
                    break;
                }
                count += 1;
            }
            for part in [map.range(), map.part(100, 50), map.part(1000, 1)] {
                match hmm.migrate(part, device.id()) {
                    Ok(report) => adds_up(&report, part),
                    Err(error) => eprintln!("{error}"),
                }
                map.check(3);
            }
            eprintln!("{count} mappings more");
            filler.protect(0, 140_000, libc::PROT_READ | libc::PROT_WRITE);
            drop(filler);
            send(&hmm, map.range(), &device);
            map.check(3);
            hmm.shutdown().unwrap();
        }
        Some(other) => panic!("no helper {other}"),
    }
}

on_each!(two_engines_do_not_take_each_others_pages: software, vulkan);
fn two_engines_do_not_take_each_others_pages(kind: Kind) {
    let _dog = watchdog("two_engines_do_not_take_each_others_pages", 60);
    let (first, one) = or_skip!(open(kind, 4));
    let second = Hmm::open().unwrap();
    let two = or_skip!(add(&second, kind, 4));
    let map = Map::new(64);
    map.fill(11);
    send(&first, map.range(), &one);
    let report = second.migrate(map.range(), two.id()).unwrap();
    adds_up(&report, map.range());
    assert!(only(&report, StayReason::ForeignUserfaultfd), "{report}");
    map.check(11);
    first.shutdown().unwrap();
    send(&second, map.range(), &two);
    map.check(11);
    drop(map);
    second.shutdown().unwrap();
}
