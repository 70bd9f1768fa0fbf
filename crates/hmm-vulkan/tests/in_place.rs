//! Imports, as the engine and the device agree on them: granted with locks held, taken
//! up without, and given back before an unmapping returns.

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hmm_conformance::{Operation, Subject};
use hmm_hal::{Device, DeviceFaultError, FaultHandler, Resolution};
use hmm_types::{Access, ByteCount, DeviceId, PageCount, PageRange, VirtAddr};
use hmm_vulkan::{Copies, ImportFailure, KernelError, LaunchError, Variant, VulkanConfig};

use crate::common::Tested;

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
const ID: DeviceId = DeviceId::new(2);

/// Shared memory of whole blocks.
struct Shared {
    base: *mut u64,
    range: PageRange,
}

// SAFETY: plain memory, used through volatile accesses.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(blocks: usize) -> Self {
        let (len, block) = (blocks * 512 * PAGE, 512 * PAGE);
        // SAFETY: a fresh mapping, and another one in its middle.
        let base = unsafe {
            let none = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let spare = libc::mmap(std::ptr::null_mut(), len + block, none.0, none.1, -1, 0);
            assert_ne!(spare, libc::MAP_FAILED);
            let base = spare.byte_add(spare.align_offset(block));
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            assert_eq!(libc::mmap(base, len, access, flags, -1, 0), base);
            base
        };
        base.expose_provenance();
        let pages = PageCount::from(blocks * 512);
        let range = PageRange::from_pages(VirtAddr::of(base.cast_const().cast::<u8>()), pages);
        Self {
            base: base.cast(),
            range,
        }
    }

    fn read(&self, word: usize) -> u64 {
        assert!((word as u64) < self.range.bytes().get() / 8);
        // SAFETY: the word lies in the mapping.
        unsafe { self.base.add(word).read_volatile() }
    }

    fn block(&self, address: VirtAddr) -> PageRange {
        let block = PageRange::from_pages(address.block_floor(), PageCount::new(512));
        block.intersection(self.range).expect("an address of it")
    }
}

type Before = Box<dyn Fn(u64, PageRange) + Send + Sync>;

/// An engine that has all memory used in place.
struct InPlace {
    tested: &'static Tested,
    memory: Shared,
    faults: AtomicU64,
    /// Called with the number of a fault and its block, before and after it is granted.
    before: Before,
    after: Before,
    /// As a block's lock.
    block: Mutex<()>,
}

impl InPlace {
    fn new(
        blocks: usize,
        variant: Variant,
        before: Before,
        after: Before,
    ) -> Option<&'static Self> {
        let mut config = VulkanConfig::new(ByteCount::mib(4));
        config.copies = Copies::Queue;
        config.own_memory = false;
        config.import_memory = true;
        let device = match common::open(config) {
            Ok(device) => device,
            Err(why) => {
                eprintln!("SKIPPED {}: {why}", module_path!());
                return None;
            }
        };
        if !device.describe().imports_pages() {
            eprintln!(
                "SKIPPED {}: {} imports no memory",
                module_path!(),
                device.info().name
            );
            device.close();
            return None;
        }
        assert!(device.info().unwatched_memory && !device.info().system_memory);
        let engine: &'static Self = Box::leak(Box::new(Self {
            tested: Tested::new(device, variant),
            memory: Shared::new(blocks),
            faults: AtomicU64::new(0),
            before,
            after,
            block: Mutex::new(()),
        }));
        device.attach(ID, engine).unwrap();
        Some(engine)
    }

    fn fill(&'static self, blocks: usize, first: u64) -> Result<(), LaunchError> {
        let operation = Operation::Fill {
            to: self.memory.range.start(),
            count: (blocks * 512 * WORDS) as u64,
            first,
        };
        self.tested.launch(operation).map(drop)
    }

    fn imported(&self) -> u64 {
        self.tested.device.stats().imported_now
    }
}

impl FaultHandler for InPlace {
    fn device_fault(
        &self,
        _: DeviceId,
        address: VirtAddr,
        _: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        if !self.memory.range.contains(address) {
            return Err(DeviceFaultError::NotMapped { address });
        }
        let (number, block) = (
            self.faults.fetch_add(1, Ordering::SeqCst),
            self.memory.block(address),
        );
        (self.before)(number, block);
        {
            let _block = self.block.lock().unwrap();
            let device = self.tested.device;
            device.map_unwatched(block, Access::Write).unwrap();
        }
        (self.after)(number, block);
        Ok(Resolution::Mapped)
    }

    fn wait_for_progress(&self) {
        std::thread::yield_now();
    }
}

fn nothing() -> Before {
    Box::new(|_, _| ())
}

#[test]
fn imports_live_as_long_as_a_launch_and_are_of_whole_blocks() {
    let Some(engine) = InPlace::new(3, Variant::Checked, nothing(), nothing()) else {
        return;
    };
    for first in [7, 1 << 40] {
        engine.fill(3, first).unwrap();
        assert_eq!(engine.imported(), 0);
        assert!((0..3 * 512 * WORDS).all(|word| engine.memory.read(word) == first + word as u64));
    }
    let stats = engine.tested.device.stats();
    assert_eq!((stats.imports, stats.import_failures), (6, 0));
    assert_eq!(stats.bytes_imported, 12 << 20);
    assert_eq!(engine.faults.load(Ordering::SeqCst), 6);
    engine.tested.close();
}

/// By another thread, with the block locked, while the driver's thread is in the engine
/// and waits for that very block.
#[test]
fn unmapping_gives_imports_back_whoever_waits() {
    static UNMAPPED: AtomicU64 = AtomicU64::new(0);
    static ENGINE: Mutex<Option<&'static InPlace>> = Mutex::new(None);
    let before: Before = Box::new(|number, _| {
        if number != 1 {
            return;
        }
        let engine = ENGINE.lock().unwrap().expect("the test has set it");
        assert_eq!(engine.imported(), 1);
        let locked = std::sync::Arc::new(AtomicBool::new(false));
        let is_locked = locked.clone();
        std::thread::spawn(move || {
            let _block = engine.block.lock().unwrap();
            locked.store(true, Ordering::SeqCst);
            // One page takes its whole import along.
            let page = engine.memory.range.slice(3, 1);
            engine.tested.device.unmap(page);
            assert_eq!(engine.imported(), 0);
            UNMAPPED.fetch_add(1, Ordering::SeqCst);
        });
        while !is_locked.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    });
    let Some(engine) = InPlace::new(2, Variant::Checked, before, nothing()) else {
        return;
    };
    *ENGINE.lock().unwrap() = Some(engine);
    engine.fill(2, 5).unwrap();
    assert_eq!(UNMAPPED.load(Ordering::SeqCst), 1);
    assert_eq!(engine.imported(), 0);
    assert!((0..2 * 512 * WORDS).all(|word| engine.memory.read(word) == 5 + word as u64));
    engine.tested.close();
}

/// A grant that was revoked before it was taken up leads to no import, and to another
/// fault.
#[test]
fn what_was_revoked_is_not_imported() {
    static ENGINE: Mutex<Option<&'static InPlace>> = Mutex::new(None);
    let after: Before = Box::new(|number, block| {
        if number < 3 {
            let engine = ENGINE.lock().unwrap().expect("the test has set it");
            engine.tested.device.unmap(block.slice(1, 1));
        }
    });
    let Some(engine) = InPlace::new(1, Variant::Checked, nothing(), after) else {
        return;
    };
    *ENGINE.lock().unwrap() = Some(engine);
    engine.fill(1, 5).unwrap();
    assert!(engine.faults.load(Ordering::SeqCst) > 3);
    assert_eq!(engine.tested.device.stats().imports, 1);
    assert_eq!(engine.imported(), 0);
    engine.tested.close();
}

/// A kernel writes without end while its memory is taken away again and again: never
/// afterwards.
#[test]
fn nothing_is_written_after_unmap() {
    let Some(engine) = InPlace::new(1, Variant::Checked, nothing(), nothing()) else {
        return;
    };
    let (device, stop) = (engine.tested.device, AtomicBool::new(false));
    let page = engine.memory.range.slice(9, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                let operation = Operation::Hammer { page: page.start() };
                engine.tested.launch(operation).unwrap();
            }
        });
        let (since, mut taken) = (Instant::now(), 0);
        while since.elapsed() < Duration::from_secs(2) {
            let imported = device.stats().imports;
            device.unmap(page);
            // A new import may follow at once, and then it may be written to.
            let word = engine.memory.read(9 * WORDS);
            std::thread::sleep(Duration::from_micros(300));
            let again = engine.memory.read(9 * WORDS);
            if device.stats().imports == imported && engine.imported() == 0 {
                assert_eq!(word, again);
                taken += 1;
            }
        }
        stop.store(true, Ordering::SeqCst);
        println!("{taken} looks, {:?}", device.stats());
    });
    assert_eq!(engine.imported(), 0);
    engine.tested.close();
}

/// A kernel that waits has begun: nothing is imported for it any more.
#[test]
fn a_kernel_that_waits_gets_no_imports() {
    let Some(engine) = InPlace::new(1, Variant::Stall, nothing(), nothing()) else {
        return;
    };
    match engine.fill(1, 5) {
        Err(LaunchError::Kernel(KernelError::NotImported { why, .. })) => {
            assert_eq!(why, ImportFailure::Runs);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(engine.tested.device.stats().imports, 0);
    assert!((0..512 * WORDS).all(|word| engine.memory.read(word) == 0));
    engine.tested.close();
}
