//! What copies by the device's queue cost: through staging memory, and read where they are.

use std::time::Instant;

use hmm_conformance::Mapped;
use hmm_hal::{Device, Transfer};
use hmm_types::{ByteCount, PageCount, VirtAddr};
use hmm_vulkan::{Copies, VulkanConfig, VulkanDevice};

const PAGES: usize = 512;
const ROUNDS: u32 = 200;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (from, to) = (Mapped::new(PAGES), Mapped::new(PAGES));
    for word in 0..PAGES * 512 {
        from.write(word, word as u64);
        to.write(word, 0);
    }
    for _ in 0..3 {
        for copies in [Copies::Queue, Copies::QueueImports] {
            let mut config = VulkanConfig::new(ByteCount::mib(16));
            config.copies = copies;
            config.own_memory = false;
            let device = VulkanDevice::open(config)?;
            let frames = device.allocate(PageCount::from(PAGES))?;
            let host: VirtAddr = from.range().start();
            let since = Instant::now();
            for _ in 0..ROUNDS {
                device.wait(device.submit(&[Transfer::ToDevice { host, frames }])?)?;
            }
            let elapsed = since.elapsed();
            let host = to.range().start();
            device.wait(device.submit(&[Transfer::ToHost { frames, host }])?)?;
            for word in 0..PAGES * 512 {
                assert_eq!(to.read(word), word as u64);
                to.write(word, 0);
            }
            let gib = f64::from(ROUNDS) * 2.0 / 1024.0;
            println!(
                "{copies:?}: {:.2} GiB/s to the device",
                gib / elapsed.as_secs_f64()
            );
            device.free(frames);
            device.close();
        }
    }
    Ok(())
}
