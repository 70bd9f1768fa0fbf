//! Unmapping while kernels hammer the pages: no access may be lost, and no
//! frame may be touched after `unmap` has returned.

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Engine, Mapped};
use hmm_hal::{Device, DeviceFaultError, FaultHandler, Resolution, Transfer};
use hmm_soft::{POISON, SoftConfig, SoftDevice};
use hmm_types::{Access, ByteCount, DeviceId, FrameRange, PageCount, PageRange, VirtAddr};

const PAGES: usize = 24;
const WORD: u64 = u64::from_ne_bytes([POISON; 8]);

fn read_word(at: *mut u64) -> u64 {
    // SAFETY: the address is one of the test's own mappings, which are whole
    // words; nobody writes to it meanwhile.
    unsafe { at.read_volatile() }
}

/// Frames that were unmapped, overwritten with poison and not freed yet.
struct Quarantine<'a> {
    engine: &'static Engine,
    bounce: &'a Mapped,
    frames: Vec<FrameRange>,
}

impl Quarantine<'_> {
    fn add(&mut self, frames: FrameRange, poison: &Mapped) {
        self.engine.transfer(Transfer::ToDevice {
            host: poison.range().start(),
            frames,
        });
        self.frames.push(frames);
        if self.frames.len() > 16 {
            self.check_oldest();
        }
    }

    fn check_oldest(&mut self) {
        let frames = self.frames.remove(0);
        self.engine.transfer(Transfer::ToHost {
            frames,
            host: self.bounce.range().start(),
        });
        for index in 0..512 {
            let word = read_word(self.bounce.word(index));
            assert_eq!(
                word, WORD,
                "{frames:?} was written to after it was unmapped"
            );
        }
        self.engine.device.free(frames);
    }
}

/// Takes pages home at random until told to stop.
fn evict(engine: &'static Engine, stop: &AtomicBool, seed: u64) -> u64 {
    let poison = Mapped::new(1);
    let bounce = Mapped::new(1);
    for index in 0..512 {
        // SAFETY: the test's own mapping.
        unsafe { poison.word(index).write_volatile(WORD) };
    }
    let mut quarantine = Quarantine {
        engine,
        bounce: &bounce,
        frames: Vec::new(),
    };
    let mut random = seed;
    let mut evictions = 0;
    while !stop.load(Ordering::Relaxed) {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let index = usize::try_from(random >> 33).unwrap() % PAGES;
        let mut page = engine.pages[index].lock().unwrap();
        let Some(frames) = *page else { continue };
        let range = engine.space.page(index);
        if random.is_multiple_of(7) {
            // Another frame under the same page, without unmapping first.
            let Ok(other) = engine.device.allocate(PageCount::ONE) else {
                continue;
            };
            // Stop writers, then copy, then switch.
            engine.device.map(range, frames, Access::Read).unwrap();
            engine.transfer(Transfer::ToHost {
                frames,
                host: bounce.range().start(),
            });
            engine.transfer(Transfer::ToDevice {
                host: bounce.range().start(),
                frames: other,
            });
            engine.device.map(range, other, Access::Write).unwrap();
            *page = Some(other);
        } else {
            engine.device.unmap(range);
            engine.transfer(Transfer::ToHost {
                frames,
                host: engine.shadow.page(index).start(),
            });
            *page = None;
        }
        quarantine.add(frames, &poison);
        drop(page);
        evictions += 1;
    }
    while !quarantine.frames.is_empty() {
        quarantine.check_oldest();
    }
    evictions
}

fn stress(membarrier: bool, retry_every: u64) {
    let mut config = SoftConfig::new(ByteCount::mib(2));
    config.workers = 3;
    config.membarrier = membarrier;
    config.poison_freed = true;
    let engine = Engine::open(config, PAGES, retry_every);
    assert!(membarrier || engine.device.uses_fences());
    let stop = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    // Words 0..256 of each page are counters, the others hold their address's
    // pattern or zero.
    let mismatch = Mutex::new(None);
    let deadline = Instant::now() + Duration::from_secs(3);
    let evictions = std::thread::scope(|scope| {
        let evictors: Vec<_> = (0..2)
            .map(|seed| {
                scope.spawn({
                    let stop = &stop;
                    move || evict(engine, stop, seed + 1)
                })
            })
            .collect();
        engine
            .device
            .launch(3, |context, worker| {
                let mut random = worker as u64 + 77;
                while Instant::now() < deadline {
                    for _ in 0..200 {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(3);
                        let place = usize::try_from(random >> 33).unwrap();
                        let page = place % PAGES;
                        let slot = page * 512 + place / PAGES % 256;
                        context.fetch_add(engine.space.word(slot), 1u64)?;
                        done.fetch_add(1, Ordering::Relaxed);
                        let quiet = page * 512 + 256 + worker * 80 + place / PAGES % 80;
                        let seen = context.load(engine.space.word(quiet))?;
                        let pattern = quiet as u64 | 0x1234_0000_0000_0000;
                        if seen != 0 && seen != pattern {
                            *mismatch.lock().unwrap() = Some((quiet, seen));
                        }
                        context.store(engine.space.word(quiet), pattern)?;
                        if place % 50 == 0 {
                            let mut part = [0u64; 300];
                            context.read_slice(engine.space.word(page * 512 + 212), &mut part)?;
                            let strange = part[44..]
                                .iter()
                                .find(|&&word| word != 0 && word >> 32 != 0x1234_0000);
                            if let Some(&word) = strange {
                                *mismatch.lock().unwrap() = Some((page * 512, word));
                            }
                        }
                    }
                }
                Ok(())
            })
            .unwrap();
        stop.store(true, Ordering::Relaxed);
        evictors
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum::<u64>()
    });
    let stats = engine.device.stats();
    println!(
        "{} additions, {evictions} evictions, {stats:?}",
        done.load(Ordering::Relaxed)
    );
    // Home with everything; what was done in place counts as well.
    let mut sum = 0;
    for (index, page) in engine.pages.iter().enumerate() {
        if let Some(frames) = page.lock().unwrap().take() {
            engine.device.unmap(engine.space.page(index));
            let host = engine.shadow.page(index).start();
            engine.transfer(Transfer::ToHost { frames, host });
            engine.device.free(frames);
        }
        for slot in index * 512..index * 512 + 256 {
            sum += read_word(engine.shadow.word(slot)) + read_word(engine.space.word(slot));
        }
    }
    assert_eq!(
        *mismatch.lock().unwrap(),
        None,
        "a kernel saw what nobody wrote"
    );
    assert_eq!(sum, done.load(Ordering::Relaxed), "additions were lost");
    assert!(evictions > 100, "only {evictions} evictions");
    // Few where the workers wait for the engine nearly all the time.
    assert!(stats.shootdown_barriers > 0);
    assert_eq!(engine.device.free_pages(), PageCount::new(512));
    engine.device.close();
}

#[test]
fn no_access_outlives_its_mapping() {
    stress(true, 0);
}

#[test]
fn no_access_outlives_its_mapping_without_membarrier() {
    stress(false, 0);
}

#[test]
fn faults_that_have_to_wait_lose_nothing() {
    stress(true, 3);
}

/// An engine of one page, which the test moves; whoever faults waits for it.
struct Staged {
    device: &'static SoftDevice,
    space: Mapped,
    page: Mutex<Option<FrameRange>>,
}

impl Staged {
    fn open(config: SoftConfig) -> &'static Self {
        let device = SoftDevice::open(config).unwrap();
        let engine: &'static Self = Box::leak(Box::new(Self {
            device,
            space: Mapped::new(1),
            page: Mutex::new(None),
        }));
        device.attach(DeviceId::new(0), engine).unwrap();
        engine
    }

    fn transfer(&self, transfer: Transfer) {
        let fence = self.device.submit(&[transfer]).unwrap();
        self.device.wait(fence).unwrap();
    }
}

impl FaultHandler for Staged {
    fn device_fault(
        &self,
        _: DeviceId,
        _: VirtAddr,
        _: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        drop(self.page.lock().unwrap());
        Ok(Resolution::Mapped)
    }

    fn wait_for_progress(&self) {}
}

#[test]
fn exclusive_pages_are_left_before_unmap_returns() {
    let mut config = SoftConfig::new(ByteCount::mib(1));
    config.workers = 2;
    let engine = Staged::open(config);
    let staging = Mapped::new(2);
    let page: PageRange = engine.space.page(0);
    engine
        .device
        .map_host(page, staging.page(1).start(), Access::Write)
        .unwrap();
    let stop = AtomicBool::new(false);
    let added = std::thread::scope(|scope| {
        let kernel = scope.spawn(|| {
            let added = AtomicU64::new(0);
            engine
                .device
                .launch(2, |context, _| {
                    while !stop.load(Ordering::Relaxed) {
                        context.fetch_add(engine.space.word(5), 1u64)?;
                        added.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
                .unwrap();
            added.into_inner()
        });
        // The page goes from one staging page to the other, some times by way
        // of a frame.
        for round in 0..2000 {
            let mut frames = engine.page.lock().unwrap();
            engine.device.unmap(page);
            let host = staging.page(round % 2).start();
            match frames.take() {
                Some(run) => {
                    engine.transfer(Transfer::ToHost { frames: run, host });
                    engine.device.free(run);
                }
                None => {
                    let last = read_word(staging.word((round + 1) % 2 * 512 + 5));
                    // SAFETY: the test's own mapping, not mapped for the device now.
                    unsafe { staging.word(round % 2 * 512 + 5).write_volatile(last) };
                }
            }
            engine.device.map_host(page, host, Access::Write).unwrap();
            if round % 3 == 0 {
                engine.device.unmap(page);
                let frames_now = engine.device.allocate(PageCount::ONE).unwrap();
                engine.transfer(Transfer::ToDevice {
                    host,
                    frames: frames_now,
                });
                engine.device.map(page, frames_now, Access::Write).unwrap();
                *frames = Some(frames_now);
            }
            drop(frames);
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        kernel.join().unwrap()
    });
    engine.device.unmap(page);
    let left = match engine.page.lock().unwrap().take() {
        Some(frames) => {
            engine.transfer(Transfer::ToHost {
                frames,
                host: staging.page(0).start(),
            });
            read_word(staging.word(5))
        }
        None => read_word(staging.word(512 + 5)),
    };
    assert_eq!(left + read_word(engine.space.word(5)), added);
    engine.device.close();
}
