//! What copies, faults and launches cost on a Vulkan device, beside a plain memcpy.
//!
//! `cargo run --release -p hmm-vulkan --example speed`

use std::time::{Duration, Instant};

#[path = "../tests/common/mod.rs"]
mod common;

use common::Tested;
use hmm_conformance::{Engine, Mapped, Operation, Subject};
use hmm_hal::{Device, Transfer};
use hmm_types::{ByteCount, PageCount, VirtAddr};
use hmm_vulkan::{Copies, Variant, VulkanConfig};

const WORDS: usize = 512;
const PAGES: usize = 8000;

fn main() {
    let mut config = VulkanConfig::new(ByteCount::mib(128));
    match common::open(config) {
        Ok(device) => {
            let about = device.describe();
            println!("{} ({}, Vulkan {})", about.name, about.driver, about.api);
            copies("copies by the CPU", device);
            device.close();
        }
        Err(reason) => return println!("{reason}"),
    }
    config.copies = Copies::Queue;
    config.own_memory = false;
    let device = common::open(config).expect("opened before");
    copies("copies by the device's queue", device);
    device.close();
    for variant in [Variant::Checked, Variant::Stall, Variant::Table] {
        kernels(variant);
    }
}

fn rate(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / f64::from(1 << 30)
}

fn copies(name: &str, device: &dyn Device) {
    let host = Mapped::new(512);
    let other = Mapped::new(512);
    let place = host.range().start();
    let frames = device.allocate(PageCount::new(512)).expect("frames");
    let repeat = |transfer: Transfer| {
        let mut best = Duration::MAX;
        for _ in 0..20 {
            let start = Instant::now();
            let fence = device.submit(&[transfer]).expect("a submission");
            device.wait(fence).expect("a copy");
            best = best.min(start.elapsed());
        }
        best
    };
    let to = repeat(Transfer::ToDevice {
        host: place,
        frames,
    });
    let from = repeat(Transfer::ToHost {
        frames,
        host: place,
    });
    let small = repeat(Transfer::ToHost {
        frames: frames.slice(0, 1),
        host: place,
    });
    let mut floor = Duration::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        // SAFETY: two mappings of that size, which nobody else uses.
        unsafe { std::ptr::copy_nonoverlapping(host.word(0), other.word(0), 512 * WORDS) };
        floor = floor.min(start.elapsed());
    }
    println!(
        "{name}, 2 MiB: to {:.1} GiB/s, from {:.1} GiB/s, memcpy {:.1} GiB/s; one page {small:?}",
        rate(2 << 20, to),
        rate(2 << 20, from),
        rate(2 << 20, floor),
    );
    device.free(frames);
}

fn kernels(variant: Variant) {
    let device = common::open(VulkanConfig::new(ByteCount::mib(128))).expect("opened before");
    let tested = Tested::new(device, variant);
    let engine = Engine::new(tested, PAGES);
    let at = engine.address(0);
    let one = Operation::Increment { at, count: 1 };
    tested.launch(one).expect("the kernel is compiled");
    let mut empty = Duration::MAX;
    for _ in 0..100 {
        let start = Instant::now();
        tested.launch(one).expect("a launch");
        empty = empty.min(start.elapsed());
    }
    let all = Operation::Fill {
        to: at,
        count: (PAGES * WORDS) as u64,
        first: 0,
    };
    let cold = tested.launch(all).expect("a launch");
    let warm = tested.launch(all).expect("a launch");
    let bytes = PAGES * 4096;
    println!(
        "{variant:?}: launch of one {empty:?}; 31 MiB filled: cold {:.2} GiB/s ({} faults in {} \
         dispatches, {:.1} us each), warm {:.2} GiB/s",
        rate(bytes, cold.elapsed),
        cold.faults,
        cold.dispatches,
        cold.elapsed.as_secs_f64() * 1e6 / cold.faults.max(1) as f64,
        rate(bytes, warm.elapsed),
    );
    if variant != Variant::Table {
        chase(tested, engine);
    }
    tested.close();
}

/// One chain of pointers over cold pages: each hop is a fault.
fn chase(tested: &'static Tested, engine: &'static Engine) {
    const HOPS: usize = 1000;
    engine.evict_all();
    for hop in 0..=HOPS {
        let next = engine.address((hop + 1) * WORDS).get();
        engine.home.write(hop * WORDS, next);
    }
    let start = engine.address(0).get();
    engine.home.write((HOPS + 10) * WORDS, start);
    let address = |page: usize| -> VirtAddr { engine.address(page * WORDS) };
    let chase = Operation::Chase {
        starts: address(HOPS + 10),
        chains: 1,
        hops: HOPS as u64,
        into: address(HOPS + 11),
    };
    let report = tested.launch(chase).expect("a launch");
    println!(
        "  one chain over {HOPS} cold pages: {} dispatches, {:.1} us a fault",
        report.dispatches,
        report.elapsed.as_secs_f64() * 1e6 / report.faults as f64,
    );
}
