//! What the threads that resolve faults call on a device allocates nothing
//! from the process's heap.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use hmm_conformance::Mapped;
use hmm_device::FailAt;
use hmm_hal::{Device, Transfer};
use hmm_types::{Access, ByteCount, PageCount, PageRange};
use hmm_vulkan::{Copies, VulkanConfig, VulkanDevice};

/// Ends the process when a thread that resolves faults uses the heap.
struct Watched;

thread_local! {
    static FAULT_PATH: Cell<bool> = const { Cell::new(false) };
}

fn check() {
    if FAULT_PATH.try_with(Cell::get).unwrap_or(false) {
        FAULT_PATH.set(false);
        eprintln!("the fault path used the process's heap");
        std::process::abort();
    }
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check();
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        check();
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static HEAP: Watched = Watched;

#[test]
fn the_device_trait_never_uses_the_heap() {
    for copies in [Copies::Fitting, Copies::Queue, Copies::QueueImports] {
        let mut config = VulkanConfig::new(ByteCount::mib(16));
        config.copies = copies;
        config.poison_freed = true;
        config.import_memory = copies == Copies::QueueImports;
        let device = device!(config);
        the_trait_without_heap(device);
        device.close();
        common::assert_silent();
    }
}

fn the_trait_without_heap(device: &VulkanDevice) {
    let host = Mapped::new(1024);
    let space = Mapped::new(1024);
    FAULT_PATH.set(true);
    let info = device.info();
    let frames = device.allocate(PageCount::new(1024)).unwrap();
    let range: PageRange = space.range();
    device.map(range, frames, Access::Write).unwrap();
    device.map(range, frames, Access::Read).unwrap();
    device.unmap(range);
    let all = [
        Transfer::ToDevice {
            host: host.range().start(),
            frames,
        },
        Transfer::ToHost {
            frames,
            host: host.range().start(),
        },
        Transfer::Zero { frames },
    ];
    let fence = device.submit(&all).unwrap();
    device.wait(fence).unwrap();
    device.injector().fail_copies(0, 1, FailAt::Wait);
    let fence = device.submit(&all[..1]).unwrap();
    assert!(device.wait(fence).is_err());
    device.free(frames);
    let free = device.free_pages();
    FAULT_PATH.set(false);
    assert_eq!(free, info.memory.whole_pages());
}
