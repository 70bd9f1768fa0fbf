//! What no device may have: guard pages, device files, the kernel's own mappings.
mod common;

use common::{
    Map, PAGE, WORDS, adds_up, all_free, engine, engine_of, fork, nothing_staged, on_device,
    pattern, send, wait, watchdog,
};
use hmm::{Disable, Hmm, LaunchError, Pointer, SoftwareDevice, StayReason, VirtAddr};

/// Linux 6.13.
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

fn load_by_device(device: &SoftwareDevice, at: *mut u8) -> Result<u8, LaunchError> {
    let (at, found) = (Pointer::<u8>::new(at), std::sync::atomic::AtomicU8::new(0));
    device.launch(1, |context, _| {
        found.store(
            context.load(at.get())?,
            std::sync::atomic::Ordering::Relaxed,
        );
        Ok(())
    })?;
    Ok(found.into_inner())
}

/// Whether reading a page kills a child, as it should.
fn kills(map: &Map, page: usize) -> bool {
    let child = fork(|| i32::from(map.get(page * WORDS) == 1));
    let status = wait(child);
    if status != -libc::SIGSEGV {
        println!("page {page}: the child's status is {status}");
    }
    status == -libc::SIGSEGV
}

fn end(hmm: Hmm, device: &SoftwareDevice) {
    all_free(&hmm, device);
    nothing_staged(&hmm);
    hmm.shutdown().unwrap();
}

#[test]
fn guard_pages_stay_guards() {
    let _dog = watchdog("guard_pages_stay_guards", 60);
    let (hmm, device) = engine(16);
    for guarded_first in [true, false] {
        let map = Map::new(700);
        map.fill(1);
        if !guarded_first {
            send(&hmm, map.range(), &device);
        }
        if !map.advise(300, 2, MADV_GUARD_INSTALL) {
            skip!("MADV_GUARD_INSTALL: {}", std::io::Error::last_os_error());
        }
        let report = hmm.migrate(map.range(), device.id()).unwrap();
        adds_up(&report, map.range());
        if guarded_first {
            assert_eq!(report.moved.get(), 698, "{report}");
            assert!(
                report
                    .stayed
                    .iter()
                    .all(|stay| stay.reason == StayReason::NoAccess),
                "{report}"
            );
            assert_eq!(on_device(&hmm, map.part(300, 2), &device), 0);
            let since = std::time::Instant::now();
            let error = load_by_device(&device, map.page(301)).expect_err("a guard page");
            assert!(format!("{error:?}").contains("NotMapped"), "{error}");
            assert!(since.elapsed().as_secs() < 3, "at once");
        }
        // The kernel tells nobody of a guard where a page is away; the page is
        // dropped when it is to come home. (A child may get it meanwhile.)
        if guarded_first {
            assert!(kills(&map, 300) && kills(&map, 301));
        }
        hmm.evict(map.range()).unwrap();
        assert_eq!(on_device(&hmm, map.range(), &device), 0);
        map.check_part(0, 300, 1);
        map.check_part(302, 398, 1);
        assert!(kills(&map, 300) && kills(&map, 301));
        assert!(map.advise(300, 2, MADV_GUARD_REMOVE));
        map.check_zero(300, 2);
        send(&hmm, map.range(), &device);
        map.check_zero(300, 2);
        map.check_part(302, 398, 1);
    }
    end(hmm, &device);
}

/// Where the kernel does not tell guards from pages.
#[test]
fn guards_that_are_not_told_take_the_page() {
    let _dog = watchdog("guards_that_are_not_told_take_the_page", 60);
    let disable = Disable {
        pagemap_scan: true,
        ..Disable::default()
    };
    let (hmm, device) = engine_of(Hmm::builder().disable(disable), 16);
    let map = Map::new(700);
    map.fill(4);
    send(&hmm, map.range(), &device);
    if !map.advise(300, 2, MADV_GUARD_INSTALL) {
        skip!("MADV_GUARD_INSTALL: {}", std::io::Error::last_os_error());
    }
    hmm.evict(map.range()).unwrap();
    map.check_part(0, 300, 4);
    map.check_part(302, 398, 4);
    assert!(kills(&map, 301));
    drop(map);
    end(hmm, &device);
}

#[test]
fn special_mappings_are_errors() {
    let _dog = watchdog("special_mappings_are_errors", 60);
    let (hmm, device) = engine(16);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut met = 0;
    for line in maps
        .lines()
        .filter(|line| line.ends_with("[vvar]") || line.ends_with("[vdso]"))
    {
        let start = line.split('-').next().unwrap();
        let start = usize::from_str_radix(start, 16).unwrap();
        let page = hmm::PageRange::new(VirtAddr::new(start as u64), PAGE as u64).unwrap();
        let report = hmm.migrate(page, device.id()).unwrap();
        assert_eq!(report.stayed[0].reason, StayReason::Special, "{line}");
        let error = load_by_device(&device, std::ptr::with_exposed_provenance_mut(start));
        println!("{line}: {error:?}");
        assert!(error.is_err(), "{line}");
        met += 1;
    }
    assert!(met > 0, "no vdso in {maps}");
    let map = Map::new(1);
    map.fill(3);
    let lowest = load_by_device(&device, map.at()).unwrap();
    assert_eq!(lowest, pattern(3, 0).to_ne_bytes()[0]);
    drop(map);
    end(hmm, &device);
}
