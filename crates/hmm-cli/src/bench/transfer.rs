//! `to_device_256m`, `to_system_256m`, both with huge pages, and `scan_256m`:
//! large transfers against memcpy of the same size by one thread.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::ensure;
use hmm::{
    ByteCount, Context, DeviceId, Hmm, KernelError, LaunchReport, Report, SoftwareDevice,
    SoftwareOptions,
};

use super::pool::Pool;
use super::sample::{Outcome, Pairs, ROUNDS, gb_per_s, timed};
use crate::floor::Area;

/// What is moved.
pub const SIZE: ByteCount = ByteCount::mib(256);
/// Size of the device.
pub const DEVICE_MEMORY: ByteCount = ByteCount::mib(512);
/// System memory for staging: enough that a whole transfer finds pages ready.
pub const STAGING: ByteCount = ByteCount::mib(768);

/// An engine with a device whose memory is there already.
pub fn open(workers: usize) -> anyhow::Result<(Hmm, SoftwareDevice)> {
    let hmm = Hmm::builder().staging_limit(STAGING).open()?;
    let options = SoftwareOptions::new(DEVICE_MEMORY)
        .workers(workers)
        .populate(true);
    let device = hmm.add_software_device(options)?;
    Ok((hmm, device))
}

/// memcpy between two areas whose pages are all there.
pub struct Memcpy {
    from: Area,
    to: Area,
}

impl Memcpy {
    /// Of huge pages or of none.
    pub fn new(huge: bool) -> anyhow::Result<Self> {
        Ok(Self {
            from: Area::filled(SIZE, huge)?,
            to: Area::filled(SIZE, huge)?,
        })
    }

    /// GB/s.
    pub fn measure(&mut self) -> f64 {
        let (from, to) = (self.from.words(), self.to.words_mut());
        let (time, ()) = timed(|| to.copy_from_slice(from));
        std::hint::black_box(to);
        gb_per_s(SIZE.get(), time)
    }
}

/// One `migrate` call, and one `evict` call.
pub fn both_ways(huge: bool) -> anyhow::Result<Outcome> {
    let names = if huge {
        ["to_device_256m_thp", "to_system_256m_thp"]
    } else {
        ["to_device_256m", "to_system_256m"]
    };
    there_and_back(&Area::filled(SIZE, huge)?, huge, names)
}

/// The same with huge pages of hugetlbfs.
pub fn hugetlb() -> anyhow::Result<Outcome> {
    let _pool = match Pool::of(SIZE) {
        Ok(pool) => pool,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    let names = ["hugetlb_to_device", "hugetlb_to_system"];
    there_and_back(&Area::hugetlb(SIZE)?, true, names)
}

fn there_and_back(area: &Area, huge: bool, names: [&'static str; 2]) -> anyhow::Result<Outcome> {
    let (hmm, device) = open(1)?;
    let mut memcpy = Memcpy::new(huge)?;
    let (mut to_device, mut to_system) = (Pairs::default(), Pairs::default());
    for round in 0..=ROUNDS {
        let floor = memcpy.measure();
        let (time, report) = timed(|| to(&hmm, area, Some(device.id())));
        report?;
        let value = gb_per_s(SIZE.get(), time);
        let floor_back = memcpy.measure();
        let (time, report) = timed(|| to(&hmm, area, None));
        report?;
        let value_back = gb_per_s(SIZE.get(), time);
        // The first round registers the memory and fills the staging: what a
        // program pays once.
        if round > 0 {
            to_device.add(floor, value);
            to_system.add(floor_back, value_back);
        }
    }
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![
        (names[0], to_device.measured()),
        (names[1], to_system.measured()),
    ]))
}

/// All of an area to a device, or home.
pub fn to(hmm: &Hmm, area: &Area, device: Option<DeviceId>) -> anyhow::Result<Report> {
    let report = match device {
        Some(device) => hmm.migrate(area.range(), device)?,
        None => hmm.evict(area.range())?,
    };
    ensure!(report.is_complete(), "not everything moved: {report}");
    Ok(report)
}

/// Runs a kernel that reads memory of the device, and checks what it finds.
pub fn finds(
    device: &SoftwareDevice,
    right: u64,
    kernel: impl Fn(&Context) -> Result<u64, KernelError> + Sync,
) -> anyhow::Result<LaunchReport> {
    let report = launch(device, right, kernel)?;
    ensure!(
        report.faults == 0,
        "{} pages were not on the device",
        report.faults
    );
    Ok(report)
}

/// Runs a kernel that reads memory, and checks what it finds.
pub fn launch(
    device: &SoftwareDevice,
    right: u64,
    kernel: impl Fn(&Context) -> Result<u64, KernelError> + Sync,
) -> anyhow::Result<LaunchReport> {
    // A static: the kernel's own store must not take a page of the stack along.
    static FOUND: AtomicU64 = AtomicU64::new(0);
    let report = device.launch(1, |context, _| {
        FOUND.store(kernel(context)?, Ordering::Relaxed);
        Ok(())
    })?;
    ensure!(
        FOUND.load(Ordering::Relaxed) == right,
        "the device read wrong data"
    );
    Ok(report)
}

/// The CPU reads what is all on the device.
pub fn scan() -> anyhow::Result<Outcome> {
    let (hmm, device) = open(1)?;
    let mut memcpy = Memcpy::new(false)?;
    let area = Area::filled(SIZE, false)?;
    let right = sum(area.words());
    let mut pairs = Pairs::default();
    for round in 0..=ROUNDS {
        to(&hmm, &area, Some(device.id()))?;
        let floor = memcpy.measure();
        let (time, found) = timed(|| sum(area.words()));
        ensure!(
            found == right,
            "the CPU read wrong data: {found:#x} for {right:#x}"
        );
        if round > 0 {
            pairs.add(floor, gb_per_s(SIZE.get(), time));
        }
    }
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![("scan_256m", pairs.measured())]))
}

/// Sum of all words.
pub fn sum(words: &[u64]) -> u64 {
    let words = std::hint::black_box(words);
    words.iter().fold(0, |sum, &word| sum.wrapping_add(word))
}
