//! `device_stream`: a kernel reads device memory in sequence, through the
//! device's page table.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::ensure;
use hmm::Pointer;

use super::sample::{Measured, Pairs, ROUNDS, gb_per_s, timed};
use super::transfer::{SIZE, open, sum, to};
use crate::floor::Area;

/// Words that the kernel fetches at a time, to its stack.
const PART: usize = 4096 / size_of::<u64>();

/// One kernel on one worker, against one thread on the same memory at home.
pub fn stream() -> anyhow::Result<Vec<(&'static str, Measured)>> {
    let (hmm, device) = open(1)?;
    let area = Area::filled(SIZE, false)?;
    let first = Pointer::of(area.words().as_ptr());
    let words = area.words().len();
    let mut pairs = Pairs::default();
    for round in 0..=ROUNDS {
        to(&hmm, &area, None)?;
        let (time, right) = timed(|| sum(area.words()));
        let floor = gb_per_s(SIZE.get(), time);

        to(&hmm, &area, Some(device.id()))?;
        static FOUND: AtomicU64 = AtomicU64::new(0);
        let report = device.launch(1, |context, _| {
            let mut part = [0u64; PART];
            let mut total = 0u64;
            for at in (0..words).step_by(PART) {
                context.read_slice(first.at(at), &mut part)?;
                total = total.wrapping_add(sum(&part));
            }
            FOUND.store(total, Ordering::Relaxed);
            Ok(())
        })?;
        ensure!(
            FOUND.load(Ordering::Relaxed) == right,
            "the device read wrong data"
        );
        ensure!(
            report.faults == 0,
            "{} pages were not on the device",
            report.faults
        );
        if round > 0 {
            pairs.add(floor, gb_per_s(SIZE.get(), report.elapsed));
        }
    }
    hmm.shutdown()?;
    Ok(vec![("device_stream", pairs.measured())])
}
