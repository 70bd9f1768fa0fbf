//! Regions of huge pages that processes share: they leave and come home whole, for
//! all of them. The kernel's pool is filled for these tests, which takes root.
mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::peer::{PATH, Peer, count, count_on, counter, fresh_path, is_peer};
use common::{
    HUGE, Map, WORDS, adds_up, all_free, engine, helper, nothing_staged, on_device, role, send,
    wait_at_most, watchdog,
};
use hmm::{AttachError, ByteCount, Error, Hmm, SharedRegion, StayReason, attach};

/// Huge pages of a region.
const COUNT: usize = 3;
const PAGES: usize = COUNT * HUGE;

fn share_huge(hmm: &Hmm, path: &Path) -> (SharedRegion, Map) {
    let bytes = ByteCount::mib(2 * COUNT as u64);
    let region = hmm.share_huge(bytes, path).unwrap();
    let map = Map::adopt(region.as_ptr(), PAGES);
    (region, map)
}

macro_rules! needs_huge_sharing {
    ($hmm:expr) => {
        if !$hmm.can_share() {
            skip!("this kernel cannot write-protect shared memory (Linux 5.19)");
        }
    };
}

#[test]
fn huge_pages_leave_and_come_home_for_every_process() {
    const NAME: &str = "huge_pages_leave_and_come_home_for_every_process";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    let _pool = pool!(COUNT);
    let (hmm, device) = engine(16);
    needs_huge_sharing!(hmm);
    let path = fresh_path(NAME);
    let (region, map) = share_huge(&hmm, &path);
    map.fill_part(0, HUGE, 1);
    let mut peers = [Peer::start(NAME, &path), Peer::start(NAME, &path)];
    for pid in [std::process::id(), peers[0].child.id()] {
        let memory = hmm::memory_of(Some(pid)).unwrap();
        let shown = memory.iter().find(|mapped| mapped.shared_region).unwrap();
        assert_eq!(shown.page_size, ByteCount::mib(2));
        assert_eq!(shown.stays(), None);
    }
    // The second page is met by nobody, and the third by a peer alone.
    peers[0].does(&format!("fill {} {HUGE} 1", 2 * HUGE));
    let report = send(&hmm, region.range(), &device);
    assert_eq!(report.huge.get(), PAGES as u64, "{report}");
    peers[1].does(&format!("check 0 {HUGE} 1"));
    assert_eq!(
        on_device(&hmm, region.range(), &device),
        2 * HUGE as u64,
        "one came home, whole"
    );
    map.check_zero(HUGE, HUGE);
    peers[1].does(&format!("check {} {HUGE} 1", 2 * HUGE));
    map.check_part(2 * HUGE, HUGE, 1);
    // Written by one, worked on by the device, read by the other.
    peers[0].does(&format!("fill 0 {PAGES} 3"));
    send(&hmm, region.range(), &device);
    count_on(&device, &map, 7);
    assert_eq!(on_device(&hmm, region.range(), &device), PAGES as u64);
    for page in 0..PAGES {
        let counted = counter(&map, page, 7).fetch_sub(1, Ordering::Relaxed);
        assert_eq!(counted, common::pattern(3, page * WORDS + 7) + 1);
    }
    send(&hmm, region.range(), &device);
    peers[1].does(&format!("check 0 {PAGES} 3"));
    peers.into_iter().for_each(Peer::ends);
    map.check(3);
    map.leak();
    drop(region);
    assert!(!path.exists());
    all_free(&hmm, &device);
    nothing_staged(&hmm);
    hmm.shutdown().unwrap();
}

#[test]
fn no_write_of_any_process_to_huge_pages_is_lost() {
    const NAME: &str = "no_write_of_any_process_to_huge_pages_is_lost";
    const TIMES: u64 = 200;
    let _dog = watchdog(NAME, 200);
    if is_peer() {
        return;
    }
    let _pool = pool!(COUNT);
    let (hmm, device) = engine(16);
    needs_huge_sharing!(hmm);
    let path = fresh_path(NAME);
    let (region, map) = share_huge(&hmm, &path);
    let mut peers = [Peer::start(NAME, &path), Peer::start(NAME, &path)];
    for peer in &mut peers {
        peer.tell(&format!("count 3 {TIMES}"));
    }
    let done = AtomicBool::new(false);
    let launches = std::thread::scope(|scope| {
        let launches = scope.spawn(|| {
            let mut launches = 0;
            while !done.load(Ordering::Relaxed) {
                hmm.migrate(&region, device.id()).unwrap();
                count_on(&device, &map, 3);
                launches += 1;
            }
            launches
        });
        scope.spawn(|| count(&map, 3, TIMES));
        for _ in 0..3 {
            let mut late = Peer::start(NAME, &path);
            late.does("count 3 10");
            late.ends();
        }
        for peer in &mut peers {
            assert_eq!(peer.answer(), "done");
        }
        done.store(true, Ordering::Relaxed);
        launches.join().unwrap()
    });
    println!("{launches} launches; {}", hmm.statistics().pages_to_device);
    assert!(hmm.statistics().pages_to_device > 0);
    peers.into_iter().for_each(Peer::ends);
    for page in 0..PAGES {
        let counted = counter(&map, page, 3).load(Ordering::Relaxed);
        assert_eq!(counted, 3 * TIMES + 30 + launches, "page {page}");
    }
    map.leak();
    drop(region);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

#[test]
fn what_an_owner_of_huge_pages_takes_with_it_is_no_zeros() {
    const NAME: &str = "what_an_owner_of_huge_pages_takes_with_it_is_no_zeros";
    let _dog = watchdog(NAME, 100);
    if role().as_deref() == Some("owner") {
        let (hmm, device) = engine(16);
        let path = std::env::var_os(PATH).unwrap();
        let (region, map) = share_huge(&hmm, Path::new(&path));
        map.fill(1);
        send(&hmm, map.part(HUGE, HUGE), &device);
        println!("\nready");
        std::thread::sleep(Duration::from_secs(100));
        drop(region);
        return;
    }
    if is_peer() {
        return;
    }
    let _pool = pool!(COUNT);
    let (hmm, _) = engine(1);
    needs_huge_sharing!(hmm);
    if !hmm.marks_lost_pages() {
        skip!("no UFFDIO_POISON (Linux 6.6): the process that has the region attached ends");
    }
    let path = fresh_path(NAME);
    let mut owner = helper(NAME, "owner")
        .env(PATH, &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut says = BufReader::new(owner.stdout.take().unwrap()).lines();
    assert!(says.any(|line| line.unwrap() == "ready"));
    let mut peers = [Peer::start(NAME, &path), Peer::start(NAME, &path)];
    peers[0].does(&format!("check 0 {HUGE} 1"));
    owner.kill().unwrap();
    owner.wait().unwrap();
    // What was at home stays, also where this process had not met it.
    peers[0].does(&format!("check {} {HUGE} 1", 2 * HUGE));
    // Until it has heard of the end, it waits.
    peers[0].tell(&format!("check {HUGE} 1 1"));
    let status = wait_at_most(&mut peers[0].child, 20).unwrap();
    assert!(!status.success(), "{status}");
    peers[1].does(&format!("check 0 {HUGE} 1"));
    let [_, other] = peers;
    other.ends();
    let _ = std::fs::remove_file(&path);
    hmm.shutdown().unwrap();
}

#[test]
fn an_empty_pool_loses_nothing_of_a_region() {
    const NAME: &str = "an_empty_pool_loses_nothing_of_a_region";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    let _pool = pool!(COUNT);
    let (hmm, device) = engine(16);
    needs_huge_sharing!(hmm);
    let path = fresh_path(NAME);
    let (region, map) = share_huge(&hmm, &path);
    map.fill(9);
    let mut peer = Peer::start(NAME, &path);
    send(&hmm, region.range(), &device);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_HUGETLB;
    let taken = Map::with(PAGES, access, flags, -1);
    taken.fill(1);
    let report = hmm.evict(region.range()).unwrap();
    adds_up(&report, region.range());
    assert_eq!(report.stayed_pages, region.range().pages(), "{report}");
    let full = |stay: &hmm::StayedRange| stay.reason == StayReason::NoSystemMemory;
    assert!(report.stayed.iter().all(full), "{report}");
    peer.tell(&format!("check 0 {PAGES} 9"));
    std::thread::sleep(Duration::from_millis(300));
    taken.check(1);
    drop(taken);
    assert_eq!(peer.answer(), "done");
    peer.ends();
    map.check(9);
    map.leak();
    drop(region);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

#[test]
fn after_the_owner_has_let_go_of_huge_pages_they_are_memory_like_any_other() {
    const NAME: &str = "after_the_owner_has_let_go_of_huge_pages_they_are_memory_like_any_other";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    let _pool = pool!(COUNT);
    let (hmm, device) = engine(16);
    needs_huge_sharing!(hmm);
    let path = fresh_path(NAME);
    let (region, map) = share_huge(&hmm, &path);
    map.fill_part(0, 2 * HUGE, 1); // the last is a hole
    let mut peers = [Peer::start(NAME, &path), Peer::start(NAME, &path)];
    send(&hmm, region.range(), &device);
    map.leak();
    drop(region);
    hmm.shutdown().unwrap();
    peers[0].does(&format!("check 0 {} 1", 2 * HUGE));
    peers[0].does(&format!("fill 0 {PAGES} 2"));
    peers[1].does(&format!("check 0 {PAGES} 2"));
    peers.into_iter().for_each(Peer::ends);
}

/// Nobody tells of the pages that a process takes out of the file itself.
#[test]
fn what_a_process_removes_is_zeros_for_all() {
    const NAME: &str = "what_a_process_removes_is_zeros_for_all";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    let _pool = pool!(COUNT);
    let (hmm, device) = engine(16);
    needs_huge_sharing!(hmm);
    let path = fresh_path(NAME);
    let (region, map) = share_huge(&hmm, &path);
    map.fill(1);
    let mut peer = Peer::start(NAME, &path);
    send(&hmm, region.range(), &device);
    peer.does(&format!("check 0 {PAGES} 1"));
    let remove = |page: usize| {
        let at = map.page(page * HUGE).cast();
        // SAFETY: drops a page of the region, which nobody uses at this moment.
        let removed = unsafe { libc::madvise(at, HUGE * common::PAGE, libc::MADV_REMOVE) };
        assert_eq!(removed, 0, "{}", std::io::Error::last_os_error());
    };
    remove(1);
    // A hole that the engine takes for a page: it stays, or leaves as zeros.
    hmm.migrate(&region, device.id()).unwrap();
    map.check_zero(HUGE, HUGE);
    peer.does(&format!("check 0 {HUGE} 1"));
    peer.does(&format!("check {} {HUGE} 1", 2 * HUGE));
    remove(0);
    peer.does(&format!("fill 0 {HUGE} 4"));
    send(&hmm, region.range(), &device);
    map.check_part(0, HUGE, 4);
    map.check_zero(HUGE, HUGE);
    map.check_part(2 * HUGE, HUGE, 1);
    peer.ends();
    map.leak();
    drop(region);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

#[test]
fn a_pool_that_is_too_small_is_an_error() {
    let _dog = watchdog("a_pool_that_is_too_small_is_an_error", 60);
    let _pool = pool!(1);
    let (hmm, device) = engine(16);
    needs_huge_sharing!(hmm);
    let path = fresh_path("small_pool");
    for bytes in [
        ByteCount::mib(4),
        ByteCount::new(1 << 60),
        ByteCount::new(u64::MAX),
    ] {
        let refused = hmm.share_huge(bytes, &path).unwrap_err();
        assert!(matches!(refused, Error::Share { .. }), "{refused}");
        assert!(!path.exists());
    }
    let refused = hmm.share_huge(ByteCount::mib(4), &path).unwrap_err();
    assert!(refused.to_string().contains("nr_hugepages"), "{refused}");
    let refused = attach(&path).unwrap_err();
    assert!(matches!(refused, AttachError::Connect(_)), "{refused}");
    // Rounded up to one that is there.
    let region = hmm.share_huge(ByteCount::new(1), &path).unwrap();
    assert_eq!(region.size(), ByteCount::mib(2));
    send(&hmm, region.range(), &device);
    drop(region);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}
