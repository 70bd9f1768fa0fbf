//! Moving, copying and refusing pages on the real kernel.

mod common;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Area, HUGE, SMALL, done, fork, kill, load, open, open_without, stopped, tag};
use hmm_hal::{AddressSpace, Event, Presence, Progress, RegisterError, SpaceId, Stop};
use hmm_os::{Disable, LinuxSpace};
use hmm_types::{PageRange, StayReason, VirtAddr};

#[test]
fn small_pages_go_out_and_come_back() {
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    let area = Area::new(512, false);
    area.fill();
    os.space.register(area.range).unwrap();
    let slot = os.small_slot(1);
    assert!(os.all_are(slot, Presence::Hole));
    assert_eq!(os.space.move_pages(area.range, slot.start()), done(512));
    assert_eq!(os.presence(area.range), [(area.range, Presence::Hole)]);
    assert_eq!(os.presence(slot), [(slot, SMALL)]);
    for page in 0..512 {
        assert_eq!(load(slot.start().plus_pages(page as u64)), tag(page));
    }
    assert_eq!(os.space.move_pages(slot, area.range.start()), done(512));
    assert!(os.all_are(slot, Presence::Hole));
    area.check();
    os.space.unregister(area.range);
}

#[test]
fn huge_pages_stay_huge() {
    let Some(os) = open() else { return };
    let Some(arena) = os.space.staging().huge else {
        println!("SKIPPED: no THP here");
        return;
    };
    let area = Area::new(512, true);
    area.fill();
    if os.lacks(
        !os.all_are(area.range, HUGE),
        "contiguous memory for a huge page, or PAGEMAP_SCAN",
    ) {
        return;
    }
    os.space.register(area.range).unwrap();
    let slot = arena.slice(512, 512);
    assert_eq!(os.space.move_pages(area.range, slot.start()), done(512));
    assert_eq!(os.presence(slot), [(slot, HUGE)]);
    assert_eq!(os.space.move_pages(slot, area.range.start()), done(512));
    assert_eq!(os.presence(area.range), [(area.range, HUGE)]);
    area.check();
}

#[test]
fn holes_are_skipped() {
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    let area = Area::new(256, false);
    (0..256)
        .step_by(2)
        .for_each(|page| area.set(page, tag(page)));
    os.space.register(area.range).unwrap();
    let slot = os.small_slot(0).slice(0, 256);
    assert_eq!(os.space.move_pages(area.range, slot.start()), done(256));
    let spans = os.presence(slot);
    assert_eq!(spans.len(), 256);
    for (index, (span, presence)) in spans.into_iter().enumerate() {
        assert_eq!(span, slot.slice(index as u64, 1));
        assert_eq!(
            presence,
            if index % 2 == 0 {
                SMALL
            } else {
                Presence::Hole
            }
        );
    }
    // Nothing but holes now.
    let other = os.small_slot(1).start();
    assert_eq!(os.space.move_pages(area.range, other), done(256));
}

/// A page that is locked for a moment while it moves: Linux 6.18 then moves
/// pages that it does not count.
#[test]
fn no_page_moves_uncounted() {
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    let area = Area::new(64, false);
    area.fill();
    os.space.register(area.range).unwrap();
    let slot = os.small_slot(0).slice(0, 64);
    let move_all = |from: PageRange, to: VirtAddr| {
        let mut moved = 0;
        while moved < 64 {
            let rest = from.slice(moved, 64 - moved);
            let Progress { done, stop } = os.space.move_pages(rest, to.plus_pages(moved));
            assert!(matches!(stop, None | Some(Stop::Again)), "{stop:?}");
            moved += done.get();
        }
    };
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let end = Instant::now() + Duration::from_secs(2);
            while Instant::now() < end {
                move_all(area.range, slot.start());
                assert!(os.all_are(area.range, Presence::Hole));
                move_all(slot, area.range.start());
                area.check();
            }
        });
        while !mover.is_finished() {
            // Locks each page, and changes nothing that is in it.
            area.advise(libc::MADV_COLD);
        }
    });
}

/// The same while the mapping moves to another place, which waits until the call is
/// over and is quicker then than a look at the page table.
#[test]
fn no_page_moves_uncounted_while_its_mapping_moves() {
    const PAGES: u64 = 256;
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    let area = Area::new(256, false);
    area.fill();
    os.space.register(area.range).unwrap();
    let slot = os.small_slot(0).slice(0, PAGES);
    // Moves all pages, out or home, while the mapping moves away from `at`. Says
    // where it is afterwards.
    let move_all = |out: bool, mut at: PageRange, round: u32| {
        let begun = AtomicBool::new(false);
        let (old, first) = (at, if out { at } else { slot });
        std::thread::scope(|scope| {
            let remapping = scope.spawn(|| {
                begun.store(true, Ordering::Release);
                // Locks each page for a moment.
                (0..round % 5).for_each(|_| advise(first, libc::MADV_COLD));
                remap(old)
            });
            while !begun.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            let (mut moved, mut refused) = (0, None);
            // A remap is two events: its thread waits for both to be read.
            while moved < PAGES || !remapping.is_finished() {
                let (from, to) = if out { (at, slot) } else { (slot, at) };
                let progress = if moved == PAGES {
                    stopped(0, Stop::Again)
                } else {
                    let rest = from.slice(moved, PAGES - moved);
                    os.space.move_pages(rest, to.start().plus_pages(moved))
                };
                moved += progress.done.get();
                let still = if out { Presence::Hole } else { SMALL };
                if moved < PAGES && !os.all_are(slot.slice(moved, PAGES - moved), still) {
                    (moved, refused) = (PAGES, Some((progress, from, to)));
                }
                match progress.stop {
                    None => {}
                    Some(Stop::Again | Stop::NotMapped) => {
                        if let Some(Event::Remap { to, .. }) = os.space.read_event() {
                            at = PageRange::from_pages(to, at.pages());
                        }
                    }
                    Some(_) => (moved, refused) = (PAGES, Some((progress, from, to))),
                }
            }
            assert_eq!(refused, None);
            at
        })
    };
    let end = Instant::now() + Duration::from_secs(3);
    let (mut at, mut round) = (area.range, 0);
    while Instant::now() < end {
        round += 1;
        at = move_all(true, at, round);
        assert!(os.all_are(at, Presence::Hole), "not all pages went");
        assert!(os.all_are(slot, SMALL), "pages got lost on the way out");
        at = move_all(false, at, round);
        assert!(os.all_are(slot, Presence::Hole), "not all pages came");
        assert!(os.all_are(at, SMALL), "pages got lost on the way home");
        at.iter_pages()
            .enumerate()
            .for_each(|(page, at)| assert_eq!(load(at), tag(page)));
    }
}

/// Moves a mapping to another place.
fn remap(range: PageRange) -> PageRange {
    let bytes = usize::try_from(range.bytes().get()).unwrap();
    // SAFETY: the new place is reserved first, and only the test uses either.
    let to = unsafe {
        let (flags, old) = (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            std::ptr::with_exposed_provenance_mut(range.start().addr()),
        );
        let place = libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0);
        assert_ne!(place, libc::MAP_FAILED);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        libc::mremap(old, bytes, bytes, flags, place)
    };
    assert_ne!(to, libc::MAP_FAILED);
    PageRange::from_pages(VirtAddr::of(to.cast::<u8>()), range.pages())
}

fn advise(range: PageRange, advice: i32) {
    let start = std::ptr::with_exposed_provenance_mut(range.start().addr());
    let bytes = usize::try_from(range.bytes().get()).unwrap();
    // SAFETY: the tests give advice that keeps what is there.
    unsafe { libc::madvise(start, bytes, advice) };
}

#[test]
fn what_is_there_is_not_replaced() {
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    let area = Area::new(64, false);
    let other = Area::new(64, false);
    area.fill();
    other.set(40, 7);
    os.space.register(area.range).unwrap();
    os.space.register(other.range).unwrap();
    let slot = os.small_slot(2).slice(0, 64);
    assert_eq!(os.space.move_pages(area.range, slot.start()), done(64));
    assert_eq!(
        os.space.move_pages(slot, other.range.start()),
        stopped(40, Stop::Exists)
    );
    assert_eq!((other.get(39), other.get(40)), (tag(39), 7));
    let rest = slot.slice(40, 24);
    let copied = os
        .space
        .copy_pages(SpaceId::OWN, rest.start(), other.range.slice(40, 24));
    assert_eq!(copied, stopped(0, Stop::Exists));
    let copied = os
        .space
        .copy_pages(SpaceId::OWN, rest.start(), area.range.slice(40, 24));
    assert_eq!((copied, area.get(63)), (done(24), tag(63)));
    let zeroed = os.space.zero_pages(SpaceId::OWN, area.range);
    assert_eq!((zeroed, area.get(0)), (stopped(40, Stop::Exists), 0));
}

#[test]
fn pages_shared_with_a_child_move_once_they_are_its_own() {
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    let area = Area::new(32, false);
    area.fill();
    let child = fork(|| {
        // SAFETY: waits for the signal that ends it.
        unsafe { libc::pause() }
    });
    os.space.register(area.range).unwrap();
    let slot = os.small_slot(0).slice(0, 32);
    area.set(3, tag(3)); // its own again
    assert_eq!(
        os.space.move_pages(area.range, slot.start()),
        stopped(0, Stop::Busy)
    );
    assert_eq!(
        os.space.move_pages(area.range.slice(3, 5), slot.start()),
        stopped(1, Stop::Busy)
    );
    assert_eq!(
        os.space.move_pages(slot.slice(0, 1), area.page(3).start()),
        done(1)
    );
    os.space.unshare(area.range).unwrap();
    assert_eq!(os.space.move_pages(area.range, slot.start()), done(32));
    assert_eq!(os.space.move_pages(slot, area.range.start()), done(32));
    area.check();
    kill(child);
}

#[test]
fn refusals_are_explained() {
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    let slot = os.small_slot(0);
    let refused = |range: PageRange| os.space.move_pages(range, slot.start());

    let locked = Area::new(8, false);
    locked.fill();
    os.space.register(locked.range).unwrap();
    if !os.lacks(!locked.lock(), "mlock") {
        assert_eq!(refused(locked.range), stopped(0, Stop::Incompatible));
        assert_eq!(
            os.space.explain_refusal(locked.page(1)),
            Some(StayReason::Locked)
        );
    }

    let mixed = Area::new(64, false);
    mixed.fill();
    os.space.register(mixed.range).unwrap();
    mixed.protect(37, 1, libc::PROT_READ);
    mixed.protect(50, 1, libc::PROT_NONE);
    assert_eq!(refused(mixed.range), stopped(37, Stop::Incompatible));
    assert_eq!(os.space.explain_refusal(mixed.page(37)), None);
    assert_eq!(
        os.space.explain_refusal(mixed.page(50)),
        Some(StayReason::NoAccess)
    );
    os.unmap(&mixed, 60, 1);
    assert_eq!(
        os.space.explain_refusal(mixed.page(60)),
        Some(StayReason::NotMapped)
    );

    let program = std::fs::File::open("/proc/self/exe").unwrap();
    let file = Area::map(1, false, libc::MAP_PRIVATE, program.as_raw_fd());
    assert_eq!(
        os.space.explain_refusal(file.range),
        Some(StayReason::FileBacked)
    );
    assert_eq!(
        os.space.register(file.range),
        Err(RegisterError::Unsuitable)
    );
    let shared = Area::map(1, false, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
    assert_eq!(
        os.space.explain_refusal(shared.range),
        Some(StayReason::Shared)
    );
    assert_eq!(
        os.space.register(shared.range),
        Err(RegisterError::Unsuitable)
    );
}

#[test]
fn ranges_of_others_are_left_alone() {
    let Some(os) = open() else { return };
    let area = Area::new(16, false);
    let other = LinuxSpace::open(common::CONFIG).unwrap();
    other.register(area.range.slice(8, 8)).unwrap();
    assert_eq!(os.space.register(area.range), Err(RegisterError::Foreign));
    os.space.register(area.range.slice(0, 8)).unwrap();
    os.space.register(area.range.slice(0, 8)).unwrap();
    drop(other);
    os.space.register(area.range).unwrap();
    os.unmap(&area, 12, 4);
    assert_eq!(
        os.space.register(area.range),
        Err(RegisterError::Unsuitable)
    );
}

#[test]
fn slots_are_provisioned() {
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    let small = os.small_slot(3);
    assert!(os.space.provision(small));
    assert_eq!(os.presence(small), [(small, SMALL)]);
    assert_eq!(load(small.start()), 0);
    assert!(os.space.provision(small), "what is there stays");
    if let Some(huge) = os.space.staging().huge {
        let huge = huge.slice(0, 512);
        assert!(os.space.provision(huge));
        let failed = os.space.counters().thp_provision_failed;
        if !os.lacks(failed > 0, "contiguous memory for a huge page") {
            assert_eq!(os.presence(huge), [(huge, HUGE)]);
        }
    }
    let area = Area::new(512, false);
    os.space.register(area.range).unwrap();
    assert_eq!(os.space.move_pages(small, area.range.start()), done(512));
    assert_eq!(area.get(511), 0);
}

#[test]
fn without_move_pages_are_copied() {
    let disable = Disable {
        move_pages: true,
        pagemap_scan: true,
        ..Disable::default()
    };
    let Some(os) = open_without(disable) else {
        return;
    };
    assert!(!os.space.capabilities().move_pages);
    let area = Area::new(16, false);
    area.fill();
    os.space.register(area.range).unwrap();
    let slot = os.small_slot(0);
    assert_eq!(
        os.space.move_pages(area.range, slot.start()),
        stopped(0, Stop::Incompatible)
    );
    assert!(os.space.provision(slot));
    assert!(os.all_are(slot, SMALL));
    assert_eq!(os.space.read_pages(area.range, slot.start()), done(16));
    assert_eq!(load(slot.start().plus_pages(15)), tag(15));
}

#[test]
fn reading_tells_instead_of_raising_a_signal() {
    let Some(os) = open() else { return };
    let area = Area::new(16, false);
    area.fill();
    area.protect(5, 1, libc::PROT_NONE);
    let target = hmm_mem::boxed([0u64; 16 * 512]);
    let to = VirtAddr::of(&*target);
    // The arena aligns large blocks to pages.
    assert!(to.is_page_aligned());
    assert_eq!(
        os.space.read_pages(area.range, to),
        stopped(5, Stop::NotMapped)
    );
    assert_eq!(load(to.plus_pages(4)), tag(4));
    assert_eq!(
        os.space.read_pages(area.page(5), to),
        stopped(0, Stop::NotMapped)
    );
    assert_eq!(os.space.read_pages(area.range.slice(6, 10), to), done(10));
}

#[test]
fn lost_pages_raise_sigbus() {
    let Some(os) = open() else { return };
    let area = Area::new(8, false);
    os.space.register(area.range).unwrap();
    let poisoned = os.space.poison_pages(SpaceId::OWN, area.page(2));
    if os.lacks(poisoned == stopped(0, Stop::Incompatible), "UFFDIO_POISON") {
        return;
    }
    assert_eq!(poisoned, done(1));
    let target = hmm_mem::boxed([0u64; 512]);
    let read = os.space.read_pages(area.page(2), VirtAddr::of(&*target));
    assert_eq!(read, stopped(0, Stop::NotMapped));
    println!("a poisoned page is {:?}", os.presence(area.range));
}
