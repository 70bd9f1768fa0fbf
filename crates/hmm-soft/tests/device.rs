//! The device's behaviour, one thing a test.

mod common;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::{Engine, Mapped};
use hmm_hal::{Device, DeviceError, DeviceFaultError, FaultHandler, Resolution, Transfer};
use hmm_soft::{
    Embedder, FailAt, Join, KernelError, LaunchError, LossMode, Pointer, SoftConfig, SoftDevice,
    SoftError, Standalone, THRASH_LIMIT,
};
use hmm_types::{Access, ByteCount, DeviceId, PAGE_SIZE, PageCount, PageRange, VirtAddr};

fn small() -> SoftConfig {
    let mut config = SoftConfig::new(ByteCount::mib(4));
    config.workers = 2;
    config
}

#[test]
fn values_of_all_kinds_come_back() {
    let engine = Engine::simple(4);
    let word = |index| engine.space.word(index);
    engine
        .device
        .launch(1, |context, _| {
            context.store(word(1), 0x1122_3344_5566_7788u64)?;
            assert_eq!(context.load(word(1).cast::<u8>())?, 0x88);
            assert_eq!(
                context.load(word(1).cast::<u32>().wrapping_add(1))?,
                0x1122_3344
            );
            context.store(word(2).cast::<f64>(), 0.25)?;
            assert_eq!(
                context.load(word(2).cast::<f64>())?.to_bits(),
                0.25f64.to_bits()
            );
            context.store(word(3).cast::<*const u64>(), word(1).cast_const())?;
            let link: *const u64 = context.load(word(3).cast::<*const u64>())?;
            assert_eq!(context.load(link)?, 0x1122_3344_5566_7788);
            context.store(word(4).cast(), [1u16, 2, 3])?;
            assert_eq!(context.load(word(4).cast::<[u16; 3]>())?, [1, 2, 3]);
            // Unaligned, and across a page.
            let odd = word(512).cast::<u8>().wrapping_sub(3).cast::<u64>();
            context.store(odd, 0x0102_0304_0506_0708)?;
            assert_eq!(context.load(odd)?, 0x0102_0304_0506_0708);
            assert_eq!(context.load(word(512).cast::<u8>())?, 0x05);
            Ok(())
        })
        .unwrap();
    engine.device.close();
}

#[test]
fn slices_cross_pages_in_both_directions() {
    let engine = Engine::simple(8);
    let numbers: Vec<u64> = (0..3000).collect();
    let mut back = vec![0u64; 3000];
    let into = back.as_mut_ptr().expose_provenance();
    engine
        .device
        .launch(1, |context, _| {
            context.write_slice(engine.space.word(100), &numbers)?;
            // SAFETY: the launch is waited for while the vector lives, and one
            // index alone uses it.
            let back = unsafe {
                std::slice::from_raw_parts_mut(
                    std::ptr::with_exposed_provenance_mut::<u64>(into),
                    3000,
                )
            };
            context.read_slice(engine.space.word(100), back)?;
            let mut on_stack = [0u64; 1000];
            context.read_slice(engine.space.word(600), &mut on_stack)?;
            assert_eq!(on_stack[..], numbers[500..1500]);
            context.write_slice(engine.space.word(0), &on_stack)?;
            assert_eq!(context.load(engine.space.word(999))?, 1499);
            Ok(())
        })
        .unwrap();
    assert!(back[900..] == numbers[900..]);
    engine.device.close();
}

#[test]
fn atomics_add_up_and_insist_on_alignment() {
    let engine = Engine::simple(1);
    let word = Pointer::new(engine.space.word(0));
    engine
        .device
        .launch(1000, |context, index| {
            context.fetch_add(word.get(), 1u64)?;
            context.fetch_max(engine.space.word(1), index as u64)?;
            context.fetch_or(engine.space.word(2).cast::<u32>(), 1 << (index % 32))?;
            loop {
                let seen = context.atomic_load(engine.space.word(3))?;
                let done = context.compare_exchange(engine.space.word(3), seen, seen + 2)?;
                if done.is_ok() {
                    break;
                }
            }
            Ok(())
        })
        .unwrap();
    let odd = Pointer::new(word.get().cast::<u8>().wrapping_add(4).cast::<u64>());
    let report = engine.device.launch(1, |context, _| {
        let at = word.get();
        assert_eq!(context.atomic_load(at)?, 1000);
        assert_eq!(context.swap(engine.space.word(1), 0)?, 999);
        assert_eq!(context.load(engine.space.word(2).cast::<u32>())?, u32::MAX);
        assert_eq!(context.load(engine.space.word(3))?, 2000);
        context.atomic_store(at, 5)?;
        assert_eq!(context.fetch_xor(at, 1)?, 5);
        assert_eq!(context.fetch_and(at, 6)?, 4);
        assert_eq!(context.fetch_min(at, 3)?, 4);
        context.fetch_add(odd.get(), 1).map(drop)
    });
    let error = KernelError::Unaligned {
        address: VirtAddr::of(odd.get()),
        size_bytes: 8,
    };
    assert_eq!(report, Err(LaunchError::Kernel { index: 0, error }));
    engine.device.close();
}

#[test]
fn bad_addresses_fail_the_launch_and_change_nothing() {
    let engine = Engine::simple(1);
    for address in [0, 8, 0x10_0000, 1 << 47, 1 << 48, usize::MAX - 7] {
        let at = Pointer::new(std::ptr::without_provenance_mut::<u64>(address));
        let failed = engine
            .device
            .launch(1, |context, _| context.store(at.get(), 1));
        let address = VirtAddr::of(at.get());
        let error = KernelError::Fault(DeviceFaultError::NotMapped { address });
        assert_eq!(failed, Err(LaunchError::Kernel { index: 0, error }));
    }
    let far = Pointer::of(std::ptr::without_provenance::<u8>(usize::MAX - 2));
    let failed = engine
        .device
        .launch(1, |context, _| context.read_slice(far.get(), &mut [0; 16]));
    assert!(matches!(
        failed,
        Err(LaunchError::Kernel {
            error: KernelError::Overflow { .. },
            ..
        })
    ));
    assert!(
        engine
            .device
            .launch(1, |context, _| context.store(engine.space.word(0), 1))
            .is_ok()
    );
    engine.device.close();
}

#[test]
fn a_panic_ends_the_launch_and_not_the_worker() {
    let engine = Engine::simple(2);
    for round in 0..5 {
        let failed = engine.device.launch(100, |context, index| {
            context.store(engine.space.word(index), 1)?;
            assert!(index != 17, "index {index} in round {round}");
            Ok(())
        });
        match failed {
            Err(LaunchError::Panicked { index: 17, message }) => {
                assert_eq!(message, format!("index 17 in round {round}"));
            }
            other => panic!("{other:?}"),
        }
        // Nothing hangs: neither unmapping nor the next launch.
        engine.device.unmap(engine.space.range());
        let seen = AtomicUsize::new(0);
        let report = engine.device.launch(64, |_, _| {
            seen.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        assert_eq!(report.unwrap().groups, 64);
        assert_eq!(seen.into_inner(), 64);
    }
    engine.device.close();
}

#[test]
fn launches_take_turns() {
    let engine = Engine::simple(1);
    let inside = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let report = engine.device.launch(1, |context, _| {
                        assert!(!inside.swap(true, Ordering::SeqCst));
                        context.fetch_add(engine.space.word(0), 1u64)?;
                        inside.store(false, Ordering::SeqCst);
                        Ok(())
                    });
                    assert_eq!(report.unwrap().workers, 1);
                }
            });
        }
    });
    let nested = engine.device.launch(1, |_, _| {
        assert_eq!(
            engine.device.launch(1, |_, _| Ok(())),
            Err(LaunchError::Nested)
        );
        Ok(())
    });
    assert!(nested.is_ok());
    assert_eq!(engine.device.launch(0, |_, _| Ok(())).unwrap().groups, 0);
    assert_eq!(engine.device.stats().launches, 82);
    engine.device.close();
}

#[test]
fn launching_needs_an_engine_and_an_open_device() {
    let device = SoftDevice::open(small()).unwrap();
    assert_eq!(
        device.launch(1, |_, _| Ok(())),
        Err(LaunchError::NotAttached)
    );
    device.close();
    device.close();
    assert_eq!(device.launch(1, |_, _| Ok(())), Err(LaunchError::Closed));
    assert_eq!(device.allocate(PageCount::ONE), Err(DeviceError::Lost));
    assert_eq!(device.submit(&[]), Err(DeviceError::Lost));
    let page = PageRange::from_pages(VirtAddr::new(4096), PageCount::ONE);
    device.unmap(page);
    assert_eq!(
        device.map_host(page, page.start(), Access::Read),
        Err(DeviceError::Lost)
    );
    for asked in [0, 65] {
        let config = SoftConfig {
            workers: asked,
            ..small()
        };
        assert_eq!(
            SoftDevice::open(config).err(),
            Some(SoftError::Workers { asked })
        );
    }
}

#[test]
fn closing_ends_a_kernel_that_runs() {
    let engine = Engine::simple(1);
    let begun = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let launch = scope.spawn(|| {
            engine.device.launch(usize::MAX, |context, _| {
                context.fetch_add(engine.space.word(0), 1u64)?;
                begun.store(true, Ordering::SeqCst);
                Ok(())
            })
        });
        while !begun.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        engine.device.close();
        assert_eq!(launch.join().unwrap(), Err(LaunchError::Closed));
    });
}

/// Between two calls of the device somebody may look for memory to take along.
#[test]
fn memory_is_excluded_before_it_can_be_used() {
    #[derive(Default)]
    struct Noting(std::sync::Mutex<Vec<PageRange>>);
    impl Embedder for Noting {
        fn exclude(&self, range: PageRange) {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let start = range.start().get();
            let line = maps.lines().find(|line| {
                let bounds = line
                    .split(' ')
                    .next()
                    .and_then(|range| range.split_once('-'));
                let bounds = bounds.map(|(from, to)| [from, to]).unwrap();
                let [from, to] = bounds.map(|hex| u64::from_str_radix(hex, 16).unwrap());
                from <= start && start < to
            });
            let line = line.expect("the device's mapping");
            assert!(line.contains(" ---p "), "{line}");
            self.0.lock().unwrap().push(range);
        }

        fn include(&self, _range: PageRange) {}

        fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Join>> {
            Standalone.spawn(name, body)
        }
    }
    let noting = Noting::default();
    let device = SoftDevice::open_with(small(), &noting).unwrap();
    let excluded = noting.0.into_inner().unwrap();
    assert_eq!(excluded, [device.range()]);
    assert_eq!(excluded[0].bytes(), device.info().memory);
    device.close();
}

#[test]
fn allocation_and_mapping_fail_on_demand() {
    let device = SoftDevice::open(small()).unwrap();
    device.injector().fail_allocations(2);
    for _ in 0..2 {
        assert_eq!(
            device.allocate(PageCount::ONE),
            Err(DeviceError::OutOfMemory)
        );
    }
    let frames = device.allocate(PageCount::new(4)).unwrap();
    assert_eq!(device.free_pages(), PageCount::new(1020));
    let range = PageRange::from_pages(VirtAddr::new(1 << 30), PageCount::new(4));
    device.map(range, frames, Access::Write).unwrap();
    device.injector().fail_maps(1);
    assert_eq!(
        device.map(range, frames, Access::Read),
        Err(DeviceError::OutOfMemory)
    );
    assert_eq!(
        device.stats().shootdowns,
        1,
        "a failed mapping leaves nothing mapped"
    );
    device.free(frames);
    assert_eq!(device.free_pages(), PageCount::new(1024));
    device.close();
}

#[test]
fn copies_fail_on_demand_early_and_late() {
    let device = SoftDevice::open(small()).unwrap();
    let host = Mapped::new(4);
    let frames = device.allocate(PageCount::new(4)).unwrap();
    let there = Transfer::ToDevice {
        host: host.range().start(),
        frames,
    };
    let back = Transfer::ToHost {
        frames,
        host: host.range().start(),
    };
    device.injector().fail_copies(1, 1, FailAt::Submit);
    assert!(device.submit(&[there]).is_ok());
    assert_eq!(device.submit(&[there]), Err(DeviceError::CopyFailed));
    device.injector().fail_copies(0, 100, FailAt::Wait);
    let fences: Vec<_> = (0..65).map(|_| device.submit(&[back])).collect();
    assert_eq!(
        fences[64],
        Err(DeviceError::CopyFailed),
        "no place left to remember it"
    );
    for fence in &fences[..64] {
        assert_eq!(device.wait(fence.unwrap()), Err(DeviceError::CopyFailed));
    }
    device.injector().fail_copies(0, 0, FailAt::Wait);
    let fence = device.submit(&[Transfer::Zero { frames }, back]).unwrap();
    assert_eq!(device.wait(fence), Ok(()));
    assert!(fence > fences[63].unwrap());
    device.close();
}

#[test]
fn frames_can_be_read_where_they_are_unless_copies_may_fail() {
    let device = SoftDevice::open(small()).unwrap();
    let host = Mapped::new(1);
    let frames = device.allocate(PageCount::ONE).unwrap();
    // SAFETY: the test's own mapping.
    unsafe { host.word(7).write(99) };
    let there = Transfer::ToDevice {
        host: host.range().start(),
        frames,
    };
    device.submit(&[there]).unwrap();
    let seen = || {
        let mut seen = None;
        let read = device.with_host_view(frames, &mut |view| {
            let word = std::ptr::with_exposed_provenance::<u64>(view.addr() + 7 * 8);
            // SAFETY: the trait's contract: the frames can be read there until the
            // closure returns.
            seen = Some(unsafe { word.read() });
        });
        assert_eq!(read, seen.is_some());
        seen
    };
    let before = device.stats().bytes_to_host;
    assert_eq!(seen(), Some(99));
    assert_eq!(device.stats().bytes_to_host - before, PAGE_SIZE);
    device.injector().fail_copies(3, 1, FailAt::Wait);
    assert_eq!(seen(), None, "the queue has to tell");
    device.injector().fail_copies(0, 0, FailAt::Wait);
    assert_eq!(seen(), Some(99));
    device.injector().lose(LossMode::MemoryReadable);
    assert_eq!(seen(), None, "as before");
    device.close();
    assert_eq!(seen(), None, "there is no memory any more");
}

#[test]
fn a_lost_device_gives_memory_back_only_when_readable() {
    for mode in [LossMode::MemoryReadable, LossMode::MemoryGone] {
        let engine = Engine::simple(1);
        let device = engine.device;
        device
            .launch(1, |context, _| context.store(engine.space.word(3), 99))
            .unwrap();
        device.injector().lose(mode);
        assert_eq!(device.allocate(PageCount::ONE), Err(DeviceError::Lost));
        assert_eq!(device.launch(1, |_, _| Ok(())), Err(LaunchError::Lost));
        let frames = engine.pages[0].lock().unwrap().unwrap();
        let host = engine.shadow.page(0).start();
        let there = Transfer::ToDevice { host, frames };
        assert_eq!(device.submit(&[there]), Err(DeviceError::Lost));
        device.unmap(engine.space.page(0));
        let back = device.submit(&[Transfer::ToHost { frames, host }]);
        match mode {
            LossMode::MemoryReadable => {
                device.wait(back.unwrap()).unwrap();
                // SAFETY: the test's own mapping.
                assert_eq!(unsafe { engine.shadow.word(3).read() }, 99);
            }
            LossMode::MemoryGone => assert_eq!(back, Err(DeviceError::Lost)),
        }
        device.free(frames);
        device.close();
    }
}

#[test]
fn a_device_lost_under_a_kernel_fails_its_launch() {
    let engine = Engine::simple(2);
    let failed = engine.device.launch(2, |context, _| {
        context.store(engine.space.word(0), 1)?;
        engine.device.injector().lose(LossMode::MemoryGone);
        engine.device.unmap(engine.space.range());
        context.store(engine.space.word(0), 2)
    });
    let error = KernelError::Fault(DeviceFaultError::DeviceLost);
    assert!(matches!(failed, Err(LaunchError::Kernel { error: got, .. }) if got == error));
    engine.device.close();
}

/// Says that pages are mapped, and maps none; or always says to wait.
struct Liar {
    says: Resolution,
    asked: AtomicUsize,
}

impl FaultHandler for Liar {
    fn device_fault(
        &self,
        _: DeviceId,
        _: VirtAddr,
        _: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(self.says)
    }

    fn wait_for_progress(&self) {
        std::thread::sleep(Duration::from_micros(1));
    }
}

#[test]
fn a_page_that_never_stays_is_used_in_place() {
    let device = SoftDevice::open(small()).unwrap();
    let liar = Box::leak(Box::new(Liar {
        says: Resolution::Mapped,
        asked: AtomicUsize::new(0),
    }));
    device.attach(DeviceId::new(0), liar).unwrap();
    assert_eq!(
        device.attach(DeviceId::new(0), liar),
        Err(SoftError::AlreadyAttached)
    );
    let space = Mapped::new(1);
    let report = device
        .launch(1, |context, _| context.store(space.word(7), 41))
        .unwrap();
    assert_eq!(report.thrash_in_place, 1);
    assert_eq!(report.faults, u64::from(THRASH_LIMIT));
    assert_eq!(liar.asked.load(Ordering::Relaxed), THRASH_LIMIT as usize);
    // SAFETY: the test's own mapping.
    assert_eq!(unsafe { space.word(7).read() }, 41);
    device.close();
}

#[test]
#[ignore = "takes as long as an access may wait: 10 s"]
fn a_page_that_never_comes_fails_the_access() {
    let device = SoftDevice::open(small()).unwrap();
    let liar = Box::leak(Box::new(Liar {
        says: Resolution::Retry,
        asked: AtomicUsize::new(0),
    }));
    device.attach(DeviceId::new(0), liar).unwrap();
    let space = Mapped::new(1);
    let failed = device.launch(1, |context, _| context.store(space.word(7), 41));
    assert!(matches!(
        failed,
        Err(LaunchError::Kernel {
            error: KernelError::Stuck { .. },
            ..
        })
    ));
    device.close();
}
