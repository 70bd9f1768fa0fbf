//! `metadata_idle`, `metadata_resident`: what the engine remembers of a page.
//!
//! All tables of the engine and of its software devices come from the engine's
//! own memory, whose use is read before and after. A mapping is registered as a
//! whole when a migration names a page of it; so one page goes to the device,
//! and all others are registered and never moved. Staging is no table, and is
//! not counted, nor what a device takes however small its memory is: the stacks
//! of its threads.

use hmm::{ByteCount, Hmm, PageCount, SoftwareOptions, engine_memory_bytes};

use super::sample::{Measured, Outcome};
use super::transfer::{DEVICE_MEMORY, SIZE, STAGING, to};
use crate::floor::Area;

/// Has next to no frames.
const SMALL_DEVICE: ByteCount = ByteCount::mib(2);

/// Both rows.
pub fn metadata() -> anyhow::Result<Outcome> {
    let hmm = Hmm::builder().staging_limit(STAGING).open()?;
    let opened = engine_memory_bytes();
    let add = |memory| hmm.add_software_device(SoftwareOptions::new(memory).workers(1));
    // What any device takes, its worker's stack above all, is none of a page.
    add(SMALL_DEVICE)?;
    let with_small = engine_memory_bytes();
    let device = add(DEVICE_MEMORY)?;
    let with_device = engine_memory_bytes();
    // What the device keeps for each frame, used or not, counts for the pages
    // in its frames.
    let small = with_small.saturating_sub(opened);
    let frames = with_device.saturating_sub(with_small).saturating_sub(small);

    let area = Area::filled(SIZE, false)?;
    hmm.migrate(area.range().slice(0, 1), device.id())?;
    let idle = engine_memory_bytes().saturating_sub(with_device);
    to(&hmm, &area, Some(device.id()))?;
    let resident = engine_memory_bytes().saturating_sub(with_device);
    hmm.shutdown()?;

    let pages = |bytes: u64, pages: PageCount| bytes as f64 / pages.get() as f64;
    let per_frame = pages(frames, DEVICE_MEMORY.whole_pages());
    let measured = |value| Measured {
        value,
        floor: None,
        ratio: None,
    };
    let area_pages = SIZE.whole_pages();
    Ok(Outcome::Measured(vec![
        ("metadata_idle", measured(pages(idle, area_pages))),
        (
            "metadata_resident",
            measured(pages(resident, area_pages) + per_frame),
        ),
    ]))
}
