//! Ends and interruptions: kill -9, exit, panics, closed descriptors, signals.
//! Nothing hangs, and what can be saved is saved.
mod common;

use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Map, Rng, WORDS, engine, fetch, helper, role, run, send, wait_at_most, watchdog};

/// Migrates and touches in three threads, for ever.
fn turmoil() -> ! {
    let (hmm, device) = engine(8);
    let map = Map::new(4000);
    map.fill(1);
    eprintln!("under way");
    std::thread::scope(|scope| {
        for number in 0..3 {
            let (hmm, map, device) = (&hmm, &map, &device);
            scope.spawn(move || {
                let mut rng = Rng::new(number + 1);
                loop {
                    let first = rng.below(3900);
                    let _ = hmm.migrate(map.part(first, 100), device.id());
                    map.check_part(first, 10, 1);
                }
            });
        }
    });
    unreachable!("the threads go on for ever")
}

#[test]
fn kill_9_while_migrations_run_ends_the_process() {
    let _dog = watchdog("kill_9_while_migrations_run_ends_the_process", 100);
    if role().as_deref() == Some("kill") {
        turmoil();
    }
    for round in 0..5 {
        let mut child = helper("kill_9_while_migrations_run_ends_the_process", "kill")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(200 + 37 * round));
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        child.kill().unwrap();
        let status = wait_at_most(&mut child, 10).expect("a killed process does not end");
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(libc::SIGKILL)
        );
    }
}

#[test]
fn exit_while_migrations_run_ends_promptly() {
    let _dog = watchdog("exit_while_migrations_run_ends_promptly", 100);
    if role().as_deref() == Some("exit") {
        std::thread::spawn(|| turmoil());
        std::thread::sleep(Duration::from_millis(500));
        std::process::exit(42);
    }
    for _ in 0..5 {
        let start = Instant::now();
        let (status, text) = run(
            helper("exit_while_migrations_run_ends_promptly", "exit"),
            20,
        );
        let status = status.unwrap_or_else(|| panic!("exit hangs: {text}"));
        assert_eq!(status.code(), Some(42), "{text}");
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "{:?}",
            start.elapsed()
        );
    }
}

#[test]
fn a_panic_with_pages_away_unwinds_as_usual() {
    let _dog = watchdog("a_panic_with_pages_away_unwinds_as_usual", 100);
    if role().as_deref() == Some("panic") {
        let (hmm, device) = engine(8);
        let map = Map::new(500);
        map.fill(2);
        send(&hmm, map.range(), &device);
        // Dropped in reverse: the mapping goes first, then the engine.
        panic!("on purpose: {}", map.get(WORDS));
    }
    let (status, text) = run(
        helper("a_panic_with_pages_away_unwinds_as_usual", "panic"),
        20,
    );
    let status = status.unwrap_or_else(|| panic!("a panic hangs: {text}"));
    assert_eq!(status.code(), Some(101), "{status} {text}");
    assert!(text.contains("on purpose"), "{text}");
}

#[test]
fn closing_all_descriptors_loses_nothing() {
    let _dog = watchdog("closing_all_descriptors_loses_nothing", 100);
    if role().as_deref() == Some("close") {
        let (hmm, device) = engine(8);
        let map = Map::new(1000);
        map.fill(3);
        send(&hmm, map.range(), &device);
        // SAFETY: closes whatever the program has open besides 0 to 2.
        assert_eq!(
            // SAFETY: nothing of this process needs its descriptors any more.
            unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) },
            0
        );
        map.check(3);
        send(&hmm, map.range(), &device);
        assert_eq!(
            common::wait(common::fork(|| i32::from(map.wrong(0, 1000, 3).is_some()))),
            0
        );
        fetch(&hmm, map.range());
        map.check(3);
        hmm.shutdown().unwrap();
        map.check(3);
        eprintln!("all there");
        return;
    }
    let (status, text) = run(helper("closing_all_descriptors_loses_nothing", "close"), 60);
    assert!(
        status.is_some_and(|status| status.success()),
        "{status:?} {text}"
    );
    assert!(text.contains("all there"), "{text}");
}

static ALARMS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_alarm(_signal: i32) {
    ALARMS.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn signals_while_faulting_do_no_harm() {
    let _dog = watchdog("signals_while_faulting_do_no_harm", 100);
    if role().as_deref() == Some("signals") {
        let (hmm, device) = engine(8);
        let map = Map::new(1500);
        map.fill(4);
        let timer = libc::itimerval {
            it_interval: libc::timeval {
                tv_sec: 0,
                tv_usec: 1000,
            },
            it_value: libc::timeval {
                tv_sec: 0,
                tv_usec: 1000,
            },
        };
        // SAFETY: a handler that only counts, and a timer.
        unsafe {
            let handler: extern "C" fn(i32) = on_alarm;
            libc::signal(libc::SIGALRM, handler as *const () as usize);
            assert_eq!(
                libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()),
                0
            );
        }
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            let report = hmm.migrate(map.range(), device.id()).unwrap();
            common::adds_up(&report, map.range());
            map.check(4);
        }
        eprintln!("{} alarms", ALARMS.load(Ordering::Relaxed));
        assert!(ALARMS.load(Ordering::Relaxed) > 500);
        hmm.shutdown().unwrap();
        map.check(4);
        eprintln!("all there");
        return;
    }
    let (status, text) = run(helper("signals_while_faulting_do_no_harm", "signals"), 60);
    assert!(
        status.is_some_and(|status| status.success()),
        "{status:?} {text}"
    );
    assert!(text.contains("all there"), "{text}");
}

#[test]
fn a_forgotten_engine_does_not_keep_a_process_alive() {
    let _dog = watchdog("a_forgotten_engine_does_not_keep_a_process_alive", 60);
    if role().as_deref() == Some("forget") {
        let (hmm, device) = engine(8);
        let map = Map::new(500);
        map.fill(5);
        send(&hmm, map.range(), &device);
        std::mem::forget(hmm);
        map.leak();
        return;
    }
    let (status, text) = run(
        helper("a_forgotten_engine_does_not_keep_a_process_alive", "forget"),
        20,
    );
    assert!(
        status.unwrap_or_else(|| panic!("hangs: {text}")).success(),
        "{text}"
    );
}

#[test]
fn system_calls_into_device_pages_work_for_root() {
    let _dog = watchdog("system_calls_into_device_pages_work_for_root", 60);
    let (hmm, device) = engine(8);
    if !hmm.serves_kernel_faults() {
        skip!("faults of the kernel are not served without privilege");
    }
    let map = Map::new(64);
    map.fill(6);
    send(&hmm, map.range(), &device);
    let (mut read, mut write) = std::io::pipe().unwrap();
    // SAFETY: the mapping, which nobody writes meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts(map.at(), map.bytes()) };
    let writer = std::thread::spawn({
        let bytes: &'static [u8] = bytes;
        move || std::io::Write::write_all(&mut write, bytes).unwrap()
    });
    let target = Map::new(64);
    target.fill(7);
    send(&hmm, target.range(), &device);
    // SAFETY: the mapping, which nobody else uses.
    let into = unsafe { std::slice::from_raw_parts_mut(target.at(), target.bytes()) };
    std::io::Read::read_exact(&mut read, into).unwrap();
    writer.join().unwrap();
    target.check(6);
    map.check(6);
    drop((map, target));
    hmm.shutdown().unwrap();
}
