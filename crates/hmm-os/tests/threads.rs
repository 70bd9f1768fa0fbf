//! Engine threads and their descriptor table.

mod common;

use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{Area, CONFIG, my_turn};
use hmm_hal::{AddressSpace, Event, Mapping, SpaceId};
use hmm_os::{EngineThread, EngineThreads, LinuxSpace, is_engine_thread};
use hmm_types::{MemoryKind, PageRange, VirtAddr};

/// What says to this test program that it is the child of a test.
const ROLE: &str = "HMM_OS_TEST_ROLE";

#[test]
fn threads_have_name_cpu_mask_and_excluded_stack() {
    let _turn = my_turn();
    let threads = EngineThreads::start().unwrap();
    let space: &'static LinuxSpace = match threads.run_on_root(|| LinuxSpace::open(CONFIG)) {
        Ok(space) => hmm_mem::leaked(space),
        Err(error) => return println!("SKIPPED: {error}"),
    };
    let seen = Arc::new(AtomicU64::new(0));
    let result = Arc::clone(&seen);
    let body = move || {
        assert!(is_engine_thread());
        let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
        assert_eq!(name, "hmm-a-long-name\n");
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(status.contains("Cpus_allowed_list:\t0\n"));
        let blocked = status
            .lines()
            .find_map(|line| line.strip_prefix("SigBlk:\t"))
            .unwrap();
        assert!(
            blocked.starts_with("ff") || blocked.starts_with("7f"),
            "{blocked}"
        );
        let local = 1u8;
        let page = PageRange::page_of(VirtAddr::of(&raw const local)).unwrap();
        space
            .mappings(page, &mut |mapping| assert!(mapping.engine_owned))
            .unwrap();
        result.store(7, Ordering::Release);
    };
    threads
        .spawn("hmm-a-long-name-indeed", Some(0), body)
        .unwrap()
        .join();
    assert_eq!(seen.load(Ordering::Acquire), 7);
    assert!(!is_engine_thread());
    assert_eq!(
        threads
            .spawn("hmm-x", Some(100_000), || {})
            .unwrap_err()
            .raw_os_error(),
        Some(libc::EINVAL)
    );

    let stranger = std::panic::catch_unwind(|| space.wait(Some(0)));
    assert!(
        stranger.is_err(),
        "another table's descriptors mean nothing here"
    );
    assert_eq!(
        threads.run_on_root(|| space.wait(Some(0))),
        hmm_os::Wakeup::TimedOut
    );
}

/// A device's thread that looks for memory to take along must not find the stack
/// of a thread that is only starting.
#[test]
fn a_stack_is_never_the_programs() {
    const THREADS: usize = 300;
    const LOOKS: usize = 1 << 20;
    let _turn = my_turn();
    let threads = EngineThreads::start().unwrap();
    let space: &'static LinuxSpace = match threads.run_on_root(|| LinuxSpace::open(CONFIG)) {
        Ok(space) => hmm_mem::leaked(space),
        Err(error) => return println!("SKIPPED: {error}"),
    };
    let stop: &'static AtomicBool = hmm_mem::leaked(AtomicBool::new(false));
    let ready: &'static AtomicBool = hmm_mem::leaked(AtomicBool::new(false));
    // Nothing is mapped by anybody else while this runs, so that no address is
    // first a stack and then something else.
    let found: &'static Mutex<Vec<PageRange>> =
        hmm_mem::leaked(Mutex::new(Vec::with_capacity(LOOKS)));
    let all = PageRange::span(VirtAddr::new(4096), VirtAddr::new((1 << 47) - 8192));
    let looker = threads.spawn("hmm-looker", None, move || {
        let mut found = found.lock().unwrap();
        while !stop.load(Ordering::Acquire) {
            let mut note = |mapping: Mapping| {
                let usable = mapping.permissions.write && !mapping.engine_owned;
                if usable && mapping.kind == MemoryKind::PrivateAnonymous && found.len() < LOOKS {
                    found.push(mapping.range);
                }
            };
            space.mappings(all, &mut note).unwrap();
            ready.store(true, Ordering::Release);
        }
    });
    while !ready.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    let stacks: Vec<&'static AtomicU64> = (0..THREADS)
        .map(|_| hmm_mem::leaked(AtomicU64::new(0)) as &_)
        .collect();
    let mut started = Vec::with_capacity(THREADS);
    for &stack in &stacks {
        let body = move || {
            let local = 0u8;
            stack.store(VirtAddr::of(&raw const local).get(), Ordering::Release);
        };
        started.push(threads.spawn("hmm-starts", None, body).unwrap());
        while stack.load(Ordering::Acquire) == 0 {
            std::thread::yield_now();
        }
    }
    stop.store(true, Ordering::Release);
    looker.unwrap().join();
    started.into_iter().for_each(EngineThread::join);
    let found = found.lock().unwrap();
    for stack in stacks {
        let at = VirtAddr::new(stack.load(Ordering::Acquire));
        let taken = found.iter().find(|range| range.contains(at));
        assert_eq!(taken, None, "the stack at {at} could have been taken");
    }
}

#[test]
fn descriptors_are_out_of_the_programs_reach() {
    let _turn = my_turn();
    if std::env::var(ROLE).as_deref() != Ok("close") {
        let name = "descriptors_are_out_of_the_programs_reach";
        let output = again(name, "close");
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let threads = EngineThreads::start().unwrap();
    // The program's descriptors are not in the engine's table, nor the reverse.
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let number = file.as_raw_fd();
    // SAFETY: asks about a number.
    let open = threads.run_on_root(|| unsafe { libc::fcntl(number, libc::F_GETFD) });
    assert_eq!(open, -1);
    let space: &'static LinuxSpace = match threads.run_on_root(|| LinuxSpace::open(CONFIG)) {
        Ok(space) => hmm_mem::leaked(space),
        Err(error) => return println!("SKIPPED: {error}"),
    };
    let stop: &'static AtomicBool = hmm_mem::leaked(AtomicBool::new(false));
    let server = threads.spawn("hmm-server", None, || {
        while !stop.load(Ordering::Acquire) {
            space.wait(Some(20));
            while let Some(event) = space.read_event() {
                if let Event::Fault {
                    space: id, address, ..
                } = event
                {
                    let page = PageRange::page_of(address).unwrap();
                    space.zero_pages(id, page);
                    space.wake(id, page);
                }
            }
        }
    });
    let area = Area::new(64, false);
    threads.run_on_root(|| space.register(area.range)).unwrap();
    // SAFETY: what a daemonizing program does.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    assert_eq!(closed, 0);
    std::mem::forget(file);
    (0..64).for_each(|page| assert_eq!(area.get(page), 0));
    assert!(space.counters().messages >= 64, "the faults were delivered");
    stop.store(true, Ordering::Release);
    server.unwrap().join();
    let zeroed = threads.run_on_root(|| space.zero_pages(SpaceId::OWN, area.page(0)));
    assert_eq!(zeroed.stop, Some(hmm_hal::Stop::Exists));
}

#[test]
fn a_panic_ends_the_process() {
    let _turn = my_turn();
    if std::env::var(ROLE).as_deref() == Ok("panic") {
        let threads = EngineThreads::start().unwrap();
        let thread = threads.spawn("hmm-doomed", None, || panic!("out of {}", "luck"));
        thread.unwrap().join();
        return;
    }
    let output = again("a_panic_ends_the_process", "panic");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(std::os::unix::process::ExitStatusExt::signal(&output.status) == Some(libc::SIGABRT));
    assert!(text.contains("out of luck"), "{text}");
    assert!(text.contains("engine thread hmm-doomed panicked"), "{text}");
}

#[test]
fn a_forked_child_can_let_the_threads_go() {
    let _turn = my_turn();
    let threads = EngineThreads::start().unwrap();
    let child = common::fork(|| {
        drop(threads);
        0
    });
    assert_eq!(common::reap(child), 0);
}

/// Runs one test of this program in a process of its own.
fn again(test: &str, role: &str) -> std::process::Output {
    let program = std::env::current_exe().unwrap();
    Command::new(program)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .output()
        .unwrap()
}
