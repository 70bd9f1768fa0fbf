//! `device_stream`: a kernel reads device memory in sequence, through the
//! device's page table.

use hmm::{Context, KernelError, Pointer};

use super::sample::{Outcome, Pairs, ROUNDS, gb_per_s, timed};
use super::transfer::{Memcpy, SIZE, finds, launch, open, sum, to};
use crate::floor::Area;

/// Words that the kernel fetches at a time, to its stack.
const PART: usize = 4096 / size_of::<u64>();

/// What the kernels do: reads all words in sequence.
fn sum_on_device(context: &Context, area: &Area) -> Result<u64, KernelError> {
    let first = Pointer::of(area.words().as_ptr());
    let mut part = [0u64; PART];
    let mut total = 0u64;
    for at in (0..area.words().len()).step_by(PART) {
        context.read_slice(first.at(at), &mut part)?;
        total = total.wrapping_add(sum(&part));
    }
    Ok(total)
}

/// One kernel on one worker, against one thread on the same memory at home.
pub fn stream() -> anyhow::Result<Outcome> {
    let (hmm, device) = open(1)?;
    let area = Area::filled(SIZE, false)?;
    let mut pairs = Pairs::default();
    for round in 0..=ROUNDS {
        to(&hmm, &area, None)?;
        let (time, right) = timed(|| sum(area.words()));
        let floor = gb_per_s(SIZE.get(), time);

        to(&hmm, &area, Some(device.id()))?;
        let report = finds(&device, right, |context| sum_on_device(context, &area))?;
        if round > 0 {
            pairs.add(floor, gb_per_s(SIZE.get(), report.elapsed));
        }
    }
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![("device_stream", pairs.measured())]))
}

/// A kernel reads a file in place that is in the page cache.
pub fn file() -> anyhow::Result<Outcome> {
    let (hmm, device) = open(1)?;
    let area = Area::file(SIZE)?;
    let right = sum(area.words());
    let mut memcpy = Memcpy::new(false)?;
    let mut pairs = Pairs::default();
    for round in 0..=ROUNDS {
        let floor = memcpy.measure();
        let report = launch(&device, right, |context| sum_on_device(context, &area))?;
        if round > 0 {
            pairs.add(floor, gb_per_s(SIZE.get(), report.elapsed));
        }
    }
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![(
        "mirror_file_read",
        pairs.measured(),
    )]))
}
