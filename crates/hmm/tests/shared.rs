//! Memory that several processes share and a device works on: it leaves and comes
//! home for all of them.
mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::peer::{PATH, Peer, count, count_on, counter, fresh_path, is_peer};
use common::{
    Map, PAGE, WORDS, all_free, engine, engine_of, fetch, fork, helper, on_device, role, send,
    signal_of_lost_data, wait, wait_at_most, watchdog,
};
use hmm::{AttachError, ByteCount, Error, Hmm, SharedRegion, attach};

/// Pages of a region: more than two blocks, and not a whole number of them.
const PAGES: usize = 1200;

fn share(hmm: &Hmm, path: &Path) -> (SharedRegion, Map) {
    let region = hmm
        .share(ByteCount::new((PAGES * PAGE) as u64), path)
        .unwrap();
    let map = Map::adopt(region.as_ptr(), PAGES);
    (region, map)
}

macro_rules! needs_sharing {
    ($hmm:expr) => {
        if !$hmm.can_share() {
            skip!("this kernel cannot write-protect shared memory (Linux 5.19)");
        }
    };
}

#[test]
fn pages_leave_and_come_home_for_every_process() {
    const NAME: &str = "pages_leave_and_come_home_for_every_process";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    let (hmm, device) = engine(16);
    needs_sharing!(hmm);
    let path = fresh_path(NAME);
    let (region, map) = share(&hmm, &path);
    map.check_zero(0, PAGES);
    map.fill(1);
    let mut peers = [Peer::start(NAME, &path), Peer::start(NAME, &path)];
    for pid in [std::process::id(), peers[0].child.id()] {
        let memory = hmm::memory_of(Some(pid)).unwrap();
        let shown = memory.iter().find(|mapped| mapped.shared_region).unwrap();
        assert_eq!(shown.range.pages(), region.range().pages());
        assert_eq!(shown.stays(), None);
    }
    for (peer, first) in peers.iter_mut().zip([0, 600]) {
        send(&hmm, region.range(), &device);
        assert_eq!(on_device(&hmm, region.range(), &device), PAGES as u64);
        peer.does(&format!("check 0 {PAGES} 1"));
        assert_eq!(on_device(&hmm, region.range(), &device), 0);
        // Half on the device, half at home.
        send(&hmm, map.part(300, 600), &device);
        peer.does(&format!("fill {first} 600 2"));
        map.check_part(first, 600, 2);
        map.fill_part(first, 600, 1);
    }
    // Written by one, worked on by the device, read by the other.
    peers[0].does(&format!("fill 0 {PAGES} 3"));
    send(&hmm, region.range(), &device);
    count_on(&device, &map, 7);
    assert_eq!(on_device(&hmm, region.range(), &device), PAGES as u64);
    for page in 0..PAGES {
        let word = counter(&map, page, 7);
        assert_eq!(
            word.fetch_sub(1, Ordering::Relaxed),
            common::pattern(3, page * WORDS + 7) + 1
        );
    }
    send(&hmm, region.range(), &device);
    peers[1].does(&format!("check 0 {PAGES} 3"));
    peers.into_iter().for_each(Peer::ends);
    map.check(3);
    map.leak();
    drop(region);
    assert!(!path.exists());
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

/// After many faults of one thread one handler alone waits, for these alone. It must
/// not be all that there is when somebody else needs an answer.
#[test]
fn children_and_peers_are_heard_after_one_thread_alone_was() {
    const NAME: &str = "children_and_peers_are_heard_after_one_thread_alone_was";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    let one_by_one = Hmm::builder()
        .fault_granule(hmm::PageCount::new(1))
        .readahead(false);
    let (hmm, device) = engine_of(one_by_one, 16);
    let map = Map::aligned(PAGES, false);
    let storm = || {
        send(&hmm, map.range(), &device);
        let before = hmm.statistics().cpu_faults;
        map.check(1);
        let faults = hmm.statistics().cpu_faults - before;
        assert!(faults >= PAGES as u64, "{faults} faults");
    };
    map.fill(1);
    for _ in 0..3 {
        storm();
        send(&hmm, map.range(), &device);
        let child = fork(|| i32::from(map.wrong(0, PAGES, 1).is_some()));
        assert_eq!(wait(child), 0);
    }
    if !hmm.can_share() {
        hmm.shutdown().unwrap();
        skip!("peers: this kernel cannot write-protect shared memory (Linux 5.19)");
    }
    storm();
    let path = fresh_path(NAME);
    let (region, shared) = share(&hmm, &path);
    shared.fill(2);
    storm();
    let mut peer = Peer::start(NAME, &path);
    for _ in 0..3 {
        storm();
        send(&hmm, region.range(), &device);
        peer.does(&format!("check 0 {PAGES} 2"));
    }
    peer.ends();
    shared.leak();
    drop(region);
    // And at the end nobody waits for ever.
    storm();
    hmm.shutdown().unwrap();
}

#[test]
fn no_write_of_any_process_is_lost() {
    const NAME: &str = "no_write_of_any_process_is_lost";
    const TIMES: u64 = 300;
    let _dog = watchdog(NAME, 200);
    if is_peer() {
        return;
    }
    let (hmm, device) = engine(16);
    needs_sharing!(hmm);
    let path = fresh_path(NAME);
    let (region, map) = share(&hmm, &path);
    let mut peers = [Peer::start(NAME, &path), Peer::start(NAME, &path)];
    // What one has in place of a page of the region is no concern of the others'.
    peers[0].does("replace 0");
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
        // One that comes while pages leave, and goes again.
        for _ in 0..5 {
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
    peers.into_iter().for_each(Peer::ends);
    for page in 0..PAGES {
        let counted = counter(&map, page, 3).load(Ordering::Relaxed);
        let processes = if page == 0 { 2 } else { 3 };
        assert_eq!(counted, processes * TIMES + 50 + launches, "page {page}");
    }
    map.leak();
    drop(region);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

#[test]
fn a_peer_that_is_killed_hurts_nobody() {
    const NAME: &str = "a_peer_that_is_killed_hurts_nobody";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    let (hmm, device) = engine(16);
    needs_sharing!(hmm);
    let path = fresh_path(NAME);
    let (region, map) = share(&hmm, &path);
    for round in 0..5 {
        let mut peer = Peer::start(NAME, &path);
        peer.tell("count 3 100000");
        for _ in 0..3 {
            hmm.migrate(&region, device.id()).unwrap();
            std::thread::sleep(Duration::from_millis(10));
        }
        peer.child.kill().unwrap();
        assert!(wait_at_most(&mut peer.child, 10).is_some(), "round {round}");
        let before = counter(&map, 0, 3).load(Ordering::Relaxed);
        send(&hmm, region.range(), &device);
        assert_eq!(counter(&map, 0, 3).load(Ordering::Relaxed), before);
    }
    map.leak();
    drop(region);
    all_free(&hmm, &device);
    hmm.shutdown().unwrap();
}

#[test]
fn what_an_owner_takes_with_it_is_no_zeros() {
    const NAME: &str = "what_an_owner_takes_with_it_is_no_zeros";
    let _dog = watchdog(NAME, 100);
    if role().as_deref() == Some("owner") {
        let (hmm, device) = engine(16);
        let (region, map) = share(&hmm, Path::new(&std::env::var_os(PATH).unwrap()));
        map.fill(1);
        send(&hmm, map.part(100, 50), &device);
        println!("\nready");
        std::thread::sleep(Duration::from_secs(100));
        drop(region);
        return;
    }
    let (hmm, _) = engine(1);
    needs_sharing!(hmm);
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
    let region = attach(&path).unwrap();
    let map = Map::adopt(region.as_ptr(), PAGES);
    // Not 100 to 149: the owner is killed before they are touched.
    map.check_part(0, 100, 1);
    owner.kill().unwrap();
    owner.wait().unwrap();
    map.check_part(150, PAGES - 150, 1);
    map.leak();
    let lost = |page: usize| {
        let at = region.as_ptr().wrapping_add(page * PAGE);
        let mut byte = 0u8;
        // The kernel says EFAULT for a page that is marked.
        let local = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: at.cast(),
            iov_len: 1,
        };
        // SAFETY: one byte of this process into another one.
        let read = unsafe {
            libc::process_vm_readv(
                libc::pid_t::try_from(std::process::id()).unwrap(),
                &raw const local,
                1,
                &raw const remote,
                1,
                0,
            )
        };
        read < 0
    };
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !lost(100) && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(lost(100) && lost(149) && !lost(99) && !lost(150));
    drop(region);
    let _ = std::fs::remove_file(&path);
    hmm.shutdown().unwrap();
}

#[test]
fn after_the_owner_has_let_go_it_is_memory_like_any_other() {
    const NAME: &str = "after_the_owner_has_let_go_it_is_memory_like_any_other";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    for by_shutdown in [false, true] {
        let (hmm, device) = engine(16);
        needs_sharing!(hmm);
        let path = fresh_path(NAME);
        let (region, map) = share(&hmm, &path);
        map.fill_part(0, 1000, 1); // the rest are holes
        let mut peers = [Peer::start(NAME, &path), Peer::start(NAME, &path)];
        send(&hmm, region.range(), &device);
        if by_shutdown {
            hmm.shutdown().unwrap();
            map.check_part(0, 1000, 1);
            map.leak();
            drop(region);
        } else {
            map.leak();
            drop(region);
            hmm.shutdown().unwrap();
        }
        peers[0].does("check 0 1000 1");
        peers[0].does(&format!("fill 0 {PAGES} 2"));
        peers[1].does(&format!("check 0 {PAGES} 2"));
        peers.into_iter().for_each(Peer::ends);
    }
}

#[test]
fn a_region_that_its_owner_unmaps_is_lost_and_says_so() {
    const NAME: &str = "a_region_that_its_owner_unmaps_is_lost_and_says_so";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    let (hmm, device) = engine(16);
    needs_sharing!(hmm);
    if !hmm.marks_lost_pages() {
        skip!("no UFFDIO_POISON (Linux 6.6)");
    }
    let path = fresh_path(NAME);
    let (region, map) = share(&hmm, &path);
    map.fill(1);
    let mut peer = Peer::start(NAME, &path);
    send(&hmm, map.part(10, 10), &device);
    // SAFETY: what the documentation forbids; nobody uses it here afterwards.
    let unmapped = unsafe { libc::munmap(region.as_ptr().cast(), PAGES * PAGE) };
    assert_eq!(unmapped, 0);
    map.leak();
    peer.does("check 0 10 1");
    peer.does("check 20 1000 1");
    peer.tell("check 10 1 1");
    let status = wait_at_most(&mut peer.child, 20).unwrap();
    assert_eq!(status.signal(), Some(signal_of_lost_data(&hmm)));
    drop(region);
    hmm.shutdown().unwrap();
}

#[test]
fn forks_do_not_have_it() {
    let _dog = watchdog("forks_do_not_have_it", 100);
    let (hmm, device) = engine(16);
    needs_sharing!(hmm);
    let path = fresh_path("forks");
    let (region, map) = share(&hmm, &path);
    let private = Map::new(100);
    private.fill(2);
    map.fill(1);
    send(&hmm, region.range(), &device);
    send(&hmm, private.range(), &device);
    let status = wait(fork(|| {
        if private.wrong(0, 100, 2).is_some() {
            return 1;
        }
        let mut there = 0u8;
        // SAFETY: asks whether one page is mapped.
        let mapped = unsafe { libc::mincore(region.as_ptr().cast(), PAGE, &raw mut there) };
        i32::from(mapped == 0) * 2
    }));
    assert_eq!(status, 0);
    map.check(1);
    fetch(&hmm, private.range());
    map.leak();
    drop(region);
    hmm.shutdown().unwrap();
}

#[test]
fn bad_requests_change_nothing() {
    const NAME: &str = "bad_requests_change_nothing";
    let _dog = watchdog(NAME, 100);
    if is_peer() {
        return;
    }
    let (hmm, device) = engine(16);
    needs_sharing!(hmm);
    let path = fresh_path(NAME);
    let refused = hmm.share(ByteCount::new(0), &path).unwrap_err();
    assert!(matches!(refused, Error::Setting { .. }), "{refused}");
    assert!(!path.exists());
    let refused = hmm.share(ByteCount::mib(1), "/nowhere/at/all").unwrap_err();
    assert!(matches!(refused, Error::Share { .. }), "{refused}");
    for bytes in [1 << 60, u64::MAX] {
        let refused = hmm.share(ByteCount::new(bytes), &path).unwrap_err();
        assert!(matches!(refused, Error::Share { .. }), "{refused}");
    }
    assert!(!path.exists());
    let refused = attach(&path).unwrap_err();
    assert!(matches!(refused, AttachError::Connect(_)), "{refused}");

    let (region, map) = share(&hmm, &path);
    map.fill(1);
    let refused = hmm.share(ByteCount::mib(1), &path).unwrap_err();
    assert!(matches!(refused, Error::Share { .. }), "{refused}");
    // Who says nothing, nonsense, or less than a descriptor.
    drop(UnixStream::connect(&path).unwrap());
    for nonsense in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[0; 16], &[7; 3]] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(nonsense).unwrap();
    }
    let mut peer = Peer::start(NAME, &path);
    // Not exclusive, and not on a coherent device's account.
    let report = hmm.exclusive(region.range(), device.id()).unwrap();
    assert_eq!(report.moved.get(), 0);
    send(&hmm, region.range(), &device);
    peer.does(&format!("check 0 {PAGES} 1"));
    peer.ends();
    map.leak();
    drop(region);
    assert!(matches!(
        attach(&path).unwrap_err(),
        AttachError::Connect(_)
    ));
    hmm.shutdown().unwrap();
}
