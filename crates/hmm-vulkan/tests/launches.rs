//! Launches: what a kernel does about pages that are missing, and every way not to end.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Tested, arguments, assert_silent, groups, load};
use hmm_conformance::{Engine, Operation, Subject};
use hmm_hal::{Device, FaultHandler};
use hmm_types::{Access, ByteCount, PageCount, VirtAddr};
use hmm_vulkan::{
    KernelCode, KernelError, LaunchError, Variant, VulkanConfig, VulkanDevice, VulkanError,
};

const WORDS: usize = 512;

fn config(mib: u64) -> VulkanConfig<'static> {
    VulkanConfig::new(ByteCount::mib(mib))
}

/// A grid that is many dispatches, each of which faults.
#[test]
fn a_large_grid_is_cut_and_every_part_of_it_faults() {
    let device = device!(config(32));
    let tested = Tested::new(device, Variant::Checked);
    const PAGES: usize = 4096;
    let engine = Engine::new(tested, PAGES);
    let (to, count) = (engine.address(0), (PAGES * WORDS) as u64);
    let report = tested
        .launch(Operation::Fill {
            to,
            count,
            first: 9,
        })
        .unwrap();
    assert!(report.dispatches - report.repeats > 2, "{report:?}");
    assert!(report.repeats > 2, "{report:?}");
    assert_eq!(report.faults, PAGES as u64, "one fault a page: {report:?}");
    engine.evict_all();
    assert!((0..PAGES * WORDS).all(|word| engine.home.read(word) == 9 + word as u64));
    tested.close();
}

/// More misses than the log holds: the rest is logged again.
#[test]
fn a_log_that_overflows_loses_nothing() {
    for variant in [Variant::Checked, Variant::Stall] {
        // A chain for each page, so that neighbours miss different pages.
        const PAGES: usize = 1000;
        let mut config = config(8);
        config.log_entries = 2;
        let device = device!(config);
        let tested = Tested::new(device, variant);
        let engine = Engine::new(tested, PAGES + 8);
        let starts = PAGES * WORDS;
        let into = starts + 4 * WORDS;
        for chain in 0..PAGES {
            let first = engine.address(chain * WORDS).get();
            engine.home.write(starts + chain, first);
            engine.home.write(chain * WORDS, chain as u64 * 3);
        }
        let chase = Operation::Chase {
            starts: engine.address(starts),
            chains: PAGES as u64,
            hops: 1,
            into: engine.address(into),
        };
        let report = tested.launch(chase).unwrap();
        assert!(report.log_overflows > 0, "{report:?}");
        assert!(report.faults >= PAGES as u64, "{report:?}");
        engine.evict_all();
        for chain in 0..PAGES {
            let end = engine.home.read(into + chain);
            assert_eq!(end, chain as u64 * 3, "chain {chain}");
        }
        tested.close();
    }
}

/// A kernel that checks nothing finds what it was said to use, and nothing else begins
/// before that is there.
#[test]
fn a_kernel_without_checks_has_its_ranges_brought() {
    let device = device!(config(8));
    let tested = Tested::new(device, Variant::Table);
    let engine = Engine::new(tested, 32);
    engine.retry_every(5);
    let (to, count) = (engine.address(3), 20 * WORDS as u64);
    let report = tested
        .launch(Operation::Fill {
            to,
            count,
            first: 1,
        })
        .unwrap();
    assert_eq!((report.dispatches, report.repeats), (1, 0));
    let report = tested
        .launch(Operation::Increment { at: to, count })
        .unwrap();
    assert_eq!((report.dispatches, report.faults), (1, 0));
    engine.evict_all();
    assert!((0..20 * WORDS).all(|word| engine.home.read(3 + word) == 2 + word as u64));
    let push = arguments([0; 5]);
    let nothing = device.launch(tested.kernel(), [1, 1, 1], &push, &[]);
    assert_eq!(nothing, Err(LaunchError::NoRanges));
    engine.protect_from(0);
    let failed = tested.launch(Operation::Increment { at: to, count: 1 });
    assert!(
        matches!(failed, Err(LaunchError::Kernel(KernelError::Fault(_)))),
        "{failed:?}"
    );
    tested.close();
}

/// Nor do its pages go before it has ended: it would write to whatever is at address 0.
#[test]
fn pages_stay_under_a_kernel_without_checks() {
    const PAGES: usize = 24;
    let device = device!(config(8));
    let tested = Tested::new(device, Variant::Table);
    let engine = Engine::new(tested, PAGES);
    let (at, count) = (engine.address(0), (PAGES * WORDS) as u64);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for page in (0..PAGES).cycle() {
                engine.evict(page);
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        for _ in 0..200 {
            tested.launch(Operation::Increment { at, count }).unwrap();
        }
        ended.store(true, Ordering::SeqCst);
    });
    assert!(device.stats().shootdowns > 20, "{:?}", device.stats());
    engine.evict_all();
    assert!((0..PAGES * WORDS).all(|word| engine.home.read(word) == 200));
    tested.close();
}

/// Each invocation needs more pages at a time than there are.
#[test]
fn a_kernel_that_can_never_have_its_pages_is_ended() {
    let mut config = config(1);
    config.memory = ByteCount::kib(16);
    let device = device!(config);
    let tested = Tested::new(device, Variant::Checked);
    let engine = Engine::new(tested, 32);
    // A ring of nodes, one a page, followed for long.
    for page in 0..16 {
        let next = engine.address((page + 1) % 16 * WORDS + 7);
        engine.home.write(page * WORDS + 7, next.get());
    }
    engine.home.write(20 * WORDS, engine.address(7).get());
    let chase = Operation::Chase {
        starts: engine.address(20 * WORDS),
        chains: 1,
        hops: 100,
        into: engine.address(21 * WORDS),
    };
    let failed = tested.launch(chase);
    assert!(
        matches!(failed, Err(LaunchError::Kernel(KernelError::Thrash { .. }))),
        "{failed:?}"
    );
    // With fewer at a time it works, also afterwards.
    let short = Operation::Sum {
        from: engine.address(7),
        count: 1,
        into: engine.address(22 * WORDS),
    };
    tested.launch(short).unwrap();
    tested.close();
}

/// All invocations together need many times the device's memory, each of them half of it.
#[test]
fn invocations_that_fit_one_by_one_all_end() {
    const CHAINS: usize = 200;
    const HOPS: usize = 6;
    let mut config = config(1);
    config.memory = ByteCount::kib(64);
    let device = device!(config);
    let tested = Tested::new(device, Variant::Checked);
    let engine = Engine::new(tested, CHAINS * HOPS + 2);
    let (starts, into) = (CHAINS * HOPS * WORDS, (CHAINS * HOPS + 1) * WORDS);
    // A node a page, those of a chain far from each other.
    let node = |chain: usize, hop: usize| (hop * CHAINS + chain) * WORDS;
    for chain in 0..CHAINS {
        let address = |hop| engine.address(node(chain, hop)).get();
        engine.home.write(starts + chain, address(0));
        for hop in 1..HOPS {
            engine.home.write(node(chain, hop - 1), address(hop));
        }
        engine.home.write(node(chain, HOPS - 1), chain as u64 * 7);
    }
    let chase = Operation::Chase {
        starts: engine.address(starts),
        chains: CHAINS as u64,
        hops: HOPS as u64,
        into: engine.address(into),
    };
    let report = tested.launch(chase).unwrap();
    println!("{report:?}");
    engine.evict_all();
    for chain in 0..CHAINS {
        assert_eq!(engine.home.read(into + chain), chain as u64 * 7);
    }
    tested.close();
}

/// A kernel that runs for ever is told to stop, and does; the device goes on.
#[test]
fn a_runaway_kernel_is_stopped() {
    for variant in [Variant::Checked, Variant::Stall] {
        let mut config = config(8);
        config.dispatch_limit = Duration::from_millis(300);
        let device = device!(config);
        let tested = Tested::new(device, variant);
        let engine = Engine::new(tested, 4);
        let since = Instant::now();
        let spin = arguments([7, 0, 0, 0, 0]);
        let failed = device.launch(tested.kernel(), [2, 1, 1], &spin, &[]);
        let runaway = LaunchError::Kernel(KernelError::Runaway { limit_ms: 300 });
        assert_eq!(failed, Err(runaway));
        assert!(since.elapsed() < Duration::from_secs(10));
        let (to, count) = (engine.address(0), 100);
        tested
            .launch(Operation::Fill {
                to,
                count,
                first: 2,
            })
            .unwrap();
        engine.evict_all();
        assert_eq!(engine.home.read(99), 101);
        tested.close();
    }
}

/// An engine that is asked for a page and does not bring it while the kernel polls.
#[derive(Debug)]
struct Never;

impl FaultHandler for Never {
    fn device_fault(
        &self,
        _: hmm_types::DeviceId,
        _: VirtAddr,
        _: Access,
    ) -> Result<hmm_hal::Resolution, hmm_hal::DeviceFaultError> {
        Ok(hmm_hal::Resolution::Mapped)
    }

    fn wait_for_progress(&self) {}
}

#[test]
fn stalled_invocations_give_up_at_their_bound() {
    let mut config = config(8);
    config.stall_polls = 1000;
    let device = device!(config);
    let kernel = load(device, Variant::Stall);
    static NEVER: Never = Never;
    device.attach(hmm_types::DeviceId::new(0), &NEVER).unwrap();
    let fill = arguments([0, 0, 0x1_0000_0000, 5, 1]);
    let failed = device.launch(&kernel, groups(5), &fill, &[]);
    let expected = KernelError::GaveUp {
        invocations: 5,
        torn: 0,
    };
    assert_eq!(failed, Err(expected.into()));
    device.close();
    assert_silent();
}

/// "Mapped" without a mapping, for ever, is no reason to go on for ever.
#[test]
fn checked_invocations_are_not_repeated_for_ever() {
    let device = device!(VulkanConfig::new(ByteCount::kib(64)));
    let kernel = load(device, Variant::Checked);
    static NEVER: Never = Never;
    device.attach(hmm_types::DeviceId::new(0), &NEVER).unwrap();
    let fill = arguments([0, 0, 0x1_0000_0000, 5, 1]);
    let failed = device.launch(&kernel, groups(5), &fill, &[]);
    assert!(
        matches!(failed, Err(LaunchError::Kernel(KernelError::Thrash { address, .. }))
            if address == VirtAddr::new(0x1_0000_0000)),
        "{failed:?}"
    );
    device.close();
    assert_silent();
}

#[test]
fn launches_that_make_no_sense_are_refused() {
    let device = device!(config(8));
    let kernel = load(device, Variant::Checked);
    let push = arguments([0; 5]);
    let unattached = device.launch(&kernel, [1, 1, 1], &push, &[]);
    assert_eq!(unattached, Err(LaunchError::NotAttached));
    static NEVER: Never = Never;
    device.attach(hmm_types::DeviceId::new(0), &NEVER).unwrap();
    let again = device.attach(hmm_types::DeviceId::new(1), &NEVER);
    assert_eq!(again, Err(VulkanError::AlreadyAttached));
    for (grid, push) in [([u32::MAX, 1, 1], &push[..]), ([1, 1, 1], &push[..8])] {
        let refused = device.launch(&kernel, grid, push, &[]);
        assert!(
            matches!(refused, Err(LaunchError::Limit { .. })),
            "{refused:?}"
        );
    }
    let nothing = device.launch(&kernel, [0, 1, 1], &push, &[]).unwrap();
    assert_eq!(nothing.dispatches, 0);
    let code = KernelCode {
        words: &[1, 2, 3, 4, 5, 6],
        entry: c"main",
        local_size: [64, 1, 1],
        push_constant_bytes: 40,
        control_constant: None,
        variant: Variant::Checked,
    };
    let huge = KernelCode {
        local_size: [1 << 20, 1 << 20, 1],
        words: &[0x0723_0203, 0, 0, 0, 0],
        ..code
    };
    for code in [code, huge] {
        // SAFETY: refused before the driver sees it.
        let refused = unsafe { device.load(&code) };
        assert!(
            matches!(refused, Err(VulkanError::BadKernel { .. })),
            "{refused:?}"
        );
    }
    device.close();
    let closed = device.launch(&kernel, [1, 1, 1], &push, &[]);
    assert_eq!(closed, Err(LaunchError::Closed));
    assert_silent();
}

/// Many threads launch at a time: each launch is whole.
#[test]
fn launches_take_turns() {
    let device = device!(config(8));
    let tested = Tested::new(device, Variant::Checked);
    let engine = Engine::new(tested, 8);
    let (at, count) = (engine.address(0), 8 * WORDS as u64);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10 {
                    tested.launch(Operation::Increment { at, count }).unwrap();
                }
            });
        }
    });
    engine.evict_all();
    assert!((0..8 * WORDS).all(|word| engine.home.read(word) == 40));
    assert_eq!(device.stats().launches, 40);
    tested.close();
}

/// A page in place is used where it is, where that was asked for.
#[test]
fn system_memory_is_used_in_place_where_it_was_asked_for() {
    let device = device!(config(8));
    assert!(!device.info().system_memory);
    device.close();
    let mut config = config(8);
    config.system_memory = true;
    let device = match VulkanDevice::open(config) {
        Err(error @ VulkanError::Elsewhere { .. }) => skip!("{error}"),
        opened => opened.unwrap(),
    };
    assert!(device.info().system_memory);
    let tested = Tested::new(device, Variant::Checked);
    let engine = Engine::new(tested, 1);
    let memory = hmm_conformance::Mapped::new(4);
    let range = memory.range();
    device
        .map_host(range, range.start(), Access::Write)
        .unwrap();
    let (to, count) = (range.start(), 4 * WORDS as u64);
    let report = tested
        .launch(Operation::Fill {
            to,
            count,
            first: 6,
        })
        .unwrap();
    assert_eq!(report.faults, 0);
    assert!((0..4 * WORDS).all(|word| memory.read(word) == 6 + word as u64));
    device.unmap(range);
    assert!(
        tested
            .launch(Operation::Fill {
                to,
                count,
                first: 6
            })
            .is_err()
    );
    assert_eq!(engine.faults.load(Ordering::SeqCst), 0);
    assert_eq!(PageCount::new(4), range.pages());
    tested.close();
}
