//! Faults and structural events of the real kernel.

mod common;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::thread;

use common::{Area, Fixture, PAGE, done, fork, load, open, open_without, reap, stopped, tag};
use hmm_hal::{AddressSpace, Event, FaultKind, SpaceId, Stop};
use hmm_os::{Disable, Wakeup};
use hmm_types::Access;

#[test]
fn faults_say_who_wants_what() {
    let Some(os) = open() else { return };
    let area = Area::new(16, false);
    os.space.register(area.range).unwrap();
    assert_eq!(os.space.wait(Some(0)), Wakeup::TimedOut);
    thread::scope(|scope| {
        scope.spawn(|| area.set(3, 5));
        let events = os.next_events();
        let [
            Event::Fault {
                space,
                address,
                kind,
                access,
                thread,
            },
        ] = events[..]
        else {
            panic!("{events:?}");
        };
        assert_eq!(
            (space, kind, access),
            (SpaceId::OWN, FaultKind::Missing, Access::Write)
        );
        assert!(area.page(3).contains(address));
        assert_ne!(thread, 0);
        // A fault in flight does not stand in the way of others.
        assert_eq!(os.space.zero_pages(SpaceId::OWN, area.page(2)), done(1));
        assert_eq!(os.space.zero_pages(SpaceId::OWN, area.page(3)), done(1));
        os.space.wake(SpaceId::OWN, area.page(3));
    });
    assert_eq!((area.get(2), area.get(3)), (0, 5));
}

#[test]
fn writes_to_protected_pages_are_faults() {
    let Some(os) = open() else { return };
    if os.lacks(!os.space.capabilities().write_protect, "write protection") {
        return;
    }
    let area = Area::new(16, false);
    area.fill();
    os.space.register(area.range).unwrap();
    assert_eq!(os.space.write_protect(area.range, true), done(16));
    area.check();
    thread::scope(|scope| {
        scope.spawn(|| area.set(9, 1));
        let events = os.next_events();
        assert!(
            matches!(
                events[..],
                [Event::Fault {
                    kind: FaultKind::WriteProtected,
                    access: Access::Write,
                    ..
                }]
            ),
            "{events:?}"
        );
        assert_eq!(os.space.write_protect(area.page(9), false), done(1));
    });
    assert_eq!((area.get(9), area.get(8)), (1, tag(8)));
    area.protect(12, 4, libc::PROT_NONE);
    assert_eq!(os.space.write_protect(area.range, true), done(16));
    let unknown = Area::new(4, false);
    assert_eq!(
        os.space.write_protect(unknown.range, true),
        stopped(0, Stop::NotMapped)
    );
}

#[test]
fn nothing_moves_while_an_event_waits() {
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    let area = Area::new(64, false);
    area.fill();
    os.space.register(area.range).unwrap();
    let slot = os.small_slot(0);
    thread::scope(|scope| {
        let unmapping = scope.spawn(|| area.unmap(32, 8));
        assert_eq!(os.space.wait(Some(10_000)), Wakeup::Events);
        assert!(!unmapping.is_finished());
        let moved = os.space.move_pages(area.range.slice(0, 8), slot.start());
        assert_eq!(moved, stopped(0, Stop::Again));
        assert_eq!(
            os.space.zero_pages(SpaceId::OWN, area.page(0)),
            stopped(0, Stop::Again)
        );
        let event = Event::Unmap {
            space: SpaceId::OWN,
            range: area.range.slice(32, 8),
        };
        assert_eq!(os.next_events(), [event]);
        unmapping.join().unwrap();
        assert_eq!(
            os.space.move_pages(area.range.slice(0, 8), slot.start()),
            done(8)
        );
        // Moving pages is not an event, on either side.
        assert_eq!(os.space.wait(Some(20)), Wakeup::TimedOut);
    });
    // The range now spans two mappings and a gap.
    let moved = os
        .space
        .move_pages(area.range.slice(8, 56), slot.start().plus_pages(8));
    assert_eq!(moved, stopped(24, Stop::NotMapped));
}

#[test]
fn dropped_and_moved_mappings_are_reported() {
    let Some(os) = open() else { return };
    let area = Area::new(64, false);
    let target = Area::new(64, false);
    area.fill();
    os.space.register(area.range).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| os.space.discard(area.range.slice(4, 2)).unwrap());
        let range = area.range.slice(4, 2);
        assert_eq!(
            os.next_events(),
            [Event::Remove {
                space: SpaceId::OWN,
                range
            }]
        );
    });
    thread::scope(|scope| {
        scope.spawn(|| {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let len = 16 * PAGE;
            // SAFETY: moves part of one area over part of another.
            let result =
                unsafe { libc::mremap(area.ptr(16).cast(), len, len, flags, target.ptr(8)) };
            assert_eq!(result, target.ptr(8).cast());
        });
        let mut events = os.next_events();
        while os.space.wait(Some(50)) == Wakeup::Events {
            events.extend(os.next_events());
        }
        let remap = Event::Remap {
            space: SpaceId::OWN,
            from: area.range.slice(16, 16),
            to: target.range.slice(8, 16).start(),
        };
        println!("mremap(MREMAP_FIXED) reports {events:?}");
        assert_eq!(events[0], remap);
    });
    assert_eq!(target.get(8), tag(16));
}

#[test]
fn a_child_gets_its_pages() {
    let Some(os) = open() else { return };
    if os.lacks_move() {
        return;
    }
    if os.lacks(
        !os.space.capabilities().fork_events,
        "fork events (CAP_SYS_PTRACE)",
    ) {
        return;
    }
    let area = Area::new(16, false);
    area.fill();
    os.space.register(area.range).unwrap();
    let slot = os.small_slot(0).slice(0, 4);
    assert_eq!(
        os.space.move_pages(area.range.slice(0, 4), slot.start()),
        done(4)
    );

    let pid = thread::scope(|scope| {
        let forking = scope.spawn(|| {
            fork(|| {
                // Page 2 is served, page 9 is there, staging is not.
                let right = area.get(2) == tag(2) && area.get(9) == tag(9);
                // SAFETY: asks whether the address is mapped.
                let staging = unsafe { libc::madvise(slot_pointer(slot), PAGE, libc::MADV_NORMAL) };
                if right && staging != 0 { 42 } else { 1 }
            })
        });
        let child = SpaceId::new(1);
        let fork = Event::Fork {
            parent: SpaceId::OWN,
            child,
        };
        // The child runs on as soon as the fork is read, so its first fault may
        // come in the same batch: behind the fork, always.
        let mut events = os.next_events();
        assert_eq!(events.remove(0), fork);
        assert_eq!(os.space.counters().children, 1);
        let pid = forking.join().unwrap();
        if events.is_empty() {
            events = os.next_events();
        }
        let [
            Event::Fault {
                space,
                address,
                access: Access::Read,
                thread,
                ..
            },
        ] = events[..]
        else {
            panic!("{events:?}");
        };
        assert_eq!(space, child);
        assert!(area.page(2).contains(address));
        assert_eq!(thread, pid.cast_unsigned());
        let copied = os
            .space
            .copy_pages(child, slot.slice(2, 1).start(), area.page(2));
        assert_eq!(copied, done(1));
        os.space.wake(child, area.page(2));
        pid
    });
    assert_eq!(reap(pid), 42);
    let child = SpaceId::new(1);
    assert_eq!(os.next_events(), [Event::Exit { space: child }]);
    assert_eq!(
        os.space.wait(Some(50)),
        Wakeup::TimedOut,
        "an exit is reported once"
    );
    assert_eq!(
        os.space.zero_pages(child, area.page(1)),
        stopped(0, Stop::Gone)
    );
    os.space.release(child);
    assert_eq!(os.space.counters().children, 0);
    assert_eq!(
        load(slot.start()),
        tag(0),
        "the parent's copy is still there"
    );
}

#[test]
fn a_child_may_write_what_was_protected_in_its_parent() {
    let Some(os) = open() else { return };
    let capabilities = os.space.capabilities();
    if os.lacks(
        !(capabilities.fork_events && capabilities.write_protect),
        "fork events (CAP_SYS_PTRACE) and write protection",
    ) {
        return;
    }
    let area = Area::new(4, false);
    area.fill();
    os.space.register(area.range).unwrap();
    assert_eq!(os.space.write_protect(area.range, true), done(4));
    let child = SpaceId::new(1);
    let pid = thread::scope(|scope| {
        let forking = scope.spawn(|| {
            fork(|| {
                area.set(2, 77);
                if area.get(2) == 77 { 42 } else { 1 }
            })
        });
        let mut events = os.next_events();
        assert!(matches!(events.remove(0), Event::Fork { .. }));
        let pid = forking.join().unwrap();
        if events.is_empty() {
            events = os.next_events();
        }
        assert!(
            matches!(
                events[..],
                [Event::Fault {
                    space,
                    kind: FaultKind::WriteProtected,
                    ..
                }] if space == child
            ),
            "{events:?}"
        );
        assert_eq!(os.space.allow_writes(child, area.page(2)), done(1));
        os.space.wake(child, area.page(2));
        pid
    });
    assert_eq!(reap(pid), 42);
    assert_eq!(area.get(2), tag(2), "the parent's page is its own");
    assert_eq!(os.next_events(), [Event::Exit { space: child }]);
    os.space.release(child);
}

/// A fault that is served late finds the page there. That fills no other page with
/// zeros, of which the child may still be owed the data.
#[test]
fn zeros_that_come_too_late_for_a_child_go_nowhere() {
    let Some(os) = open() else { return };
    if os.lacks(
        !os.space.capabilities().fork_events,
        "fork events (CAP_SYS_PTRACE)",
    ) {
        return;
    }
    // All of the 2 MiB around the page is registered.
    let area = Area::new(512, false);
    area.set(100, 7);
    os.space.register(area.range).unwrap();
    let child = SpaceId::new(1);
    let (rest, go) = std::io::pipe().unwrap();
    let pid = thread::scope(|scope| {
        let forking = scope.spawn(|| {
            fork(|| {
                let mut byte = 0u8;
                // SAFETY: waits until the parent closes the pipe or writes.
                unsafe { libc::read(rest.as_raw_fd(), (&raw mut byte).cast(), 1) };
                if area.get(0) == 9 && area.get(100) == 7 {
                    42
                } else {
                    1
                }
            })
        });
        assert!(matches!(os.next_events()[..], [Event::Fork { .. }]));
        forking.join().unwrap()
    });
    for page in [100, 99] {
        let late = os.space.zero_pages(child, area.range.slice(page, 2));
        let zeroed = u64::from(page == 99);
        assert_eq!(late, stopped(zeroed, Stop::Exists));
    }
    let source = Area::new(1, false);
    source.set(0, 9);
    let given = os
        .space
        .copy_pages(child, source.range.start(), area.page(0));
    assert_eq!(given, done(1), "page 0 was still missing");
    (&go).write_all(&[1]).unwrap();
    assert_eq!(reap(pid), 42);
    assert_eq!(os.next_events(), [Event::Exit { space: child }]);
    os.space.release(child);
}

fn slot_pointer(slot: hmm_types::PageRange) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(slot.start().addr())
}

#[test]
fn less_is_possible_without_privileges() {
    let disable = Disable {
        privileged: true,
        fork_events: true,
        ..Disable::default()
    };
    let Some(os) = open_without(disable) else {
        return;
    };
    let capabilities = os.space.capabilities();
    assert!(!capabilities.kernel_faults && !capabilities.fork_events);
    let area = Area::new(4, false);
    os.space.register(area.range).unwrap();
    // No event: the fork returns at once, and the child reads zeros.
    let child = fork(|| i32::try_from(area.get(0)).unwrap_or(1));
    assert_eq!(reap(child), 0);
    // The kernel's own access fails instead of waiting for ever.
    // SAFETY: writes into the area; a failure is expected.
    let read = unsafe {
        let zero = libc::open(c"/dev/zero".as_ptr(), libc::O_RDONLY);
        libc::read(zero, area.ptr(1).cast(), 8)
    };
    assert_eq!(read, -1);
}

#[test]
fn waiting_can_be_interrupted() {
    let Some(os) = open() else { return };
    thread::scope(|scope| {
        let waiting = scope.spawn(|| os.space.wait(Some(60_000)));
        os.space.interrupt();
        assert_eq!(waiting.join().unwrap(), Wakeup::Interrupted);
    });
    assert_eq!(os.space.wait(Some(60_000)), Wakeup::Interrupted);
    os.space.resume();
    assert_eq!(os.space.wait(Some(1)), Wakeup::TimedOut);
}

/// Waits for nothing but the process's own events until it is told to end; what it
/// has read.
fn wait_for_own(os: &Fixture) -> Vec<Event> {
    let mut events = Vec::new();
    while os.space.wait_for_own() != Wakeup::Interrupted {
        events.extend(std::iter::from_fn(|| os.space.read_event()));
    }
    events
}

#[test]
fn who_waits_for_its_own_hears_of_that_and_of_the_end() {
    let Some(os) = open() else { return };
    let area = Area::new(16, false);
    os.space.register(area.range).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            // Of nothing else.
            os.space.nudge();
            assert_eq!(os.space.wait_for_own(), Wakeup::Events);
            let event = os.space.read_event();
            let Some(Event::Fault { address, .. }) = event else {
                panic!("{event:?}");
            };
            assert!(area.page(3).contains(address), "{address}");
            assert_eq!(os.space.zero_pages(SpaceId::OWN, area.page(3)), done(1));
            os.space.wake(SpaceId::OWN, area.page(3));
            wait_for_own(&os)
        });
        let another = || assert_eq!(os.space.wait(Some(60_000)), Wakeup::Events);
        // The nudge is for who hears it.
        another();
        area.set(3, 5);
        thread::sleep(std::time::Duration::from_millis(50));
        os.space.interrupt();
        let events = waiting.join().unwrap();
        let is_drop = |event: &Event| matches!(event, Event::Remove { .. });
        assert!(
            !events.is_empty() && events.iter().all(is_drop),
            "{events:?}"
        );
    });
    assert_eq!(os.space.wait_for_own(), Wakeup::Interrupted);
    os.space.resume();
    // A nudge ends it, so it is not deaf now.
    os.space.interrupt();
    assert_eq!(os.space.wait(None), Wakeup::Interrupted);
}

#[test]
fn one_alone_is_deaf() {
    let Some(os) = open() else { return };
    thread::scope(|scope| {
        let (heard, hears) = mpsc::channel();
        for _ in 0..2 {
            let heard = heard.clone();
            let os = &os;
            scope.spawn(move || {
                let _ = heard.send(os.space.wait_for_own());
                wait_for_own(os)
            });
        }
        assert!(!os.space.needs_another(), "there are no children");
        os.space.nudge();
        assert_eq!(hears.recv(), Ok(Wakeup::Events));
        os.space.interrupt();
    });
}
