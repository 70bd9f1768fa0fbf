//! `fault_4k_p50`, `fault_4k_p99`, `fault_disjoint_2t`: a CPU touches pages
//! that are on the device, one by one.

use std::sync::Barrier;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use hmm::{ByteCount, DeviceId, Hmm, PageCount, SoftwareOptions};

use super::sample::{Outcome, Pairs, ROUNDS, quantile, shuffled, timed};
use crate::floor::{Area, BareHandler, Placement, allowed_cpus, stay_on};

/// Touches of one measurement.
const PAGES: PageCount = PageCount::new(4096);
/// Size of the device.
const DEVICE_MEMORY: ByteCount = ByteCount::mib(128);

/// An engine that brings one page a fault, and nothing of its own accord.
fn open() -> anyhow::Result<(Hmm, DeviceId)> {
    let builder = Hmm::builder()
        .fault_granule(PageCount::new(1))
        .readahead(false);
    let hmm = builder.open()?;
    let options = SoftwareOptions::new(DEVICE_MEMORY).populate(true);
    let device = hmm.add_software_device(options)?.id();
    Ok((hmm, device))
}

/// Latencies of a touch: the engine's and the barest handler's, each with the
/// toucher and the handler on the same processor (what was measured to be best
/// for the floor; the engine's handlers are where its defaults put them).
pub fn latency() -> anyhow::Result<Outcome> {
    let (hmm, device) = open()?;
    let cpu = *allowed_cpus().first().context("no processor is allowed")?;
    let on_cpu = |area: &Area, seed: u64| -> anyhow::Result<Vec<f64>> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                stay_on(cpu)?;
                Ok(touch_all(area, seed))
            });
            thread
                .join()
                .unwrap_or_else(|_| bail!("the touching thread panicked"))
        })
    };
    let (mut p50, mut p99) = (Pairs::default(), Pairs::default());
    for round in 0..=ROUNDS {
        let seed = 0x9E37 + round as u64;
        let handler = BareHandler::start(PAGES, cpu).context("cannot measure the floor")?;
        if handler.placement() == Placement::Copy && round == 0 {
            eprintln!("hmm: no UFFDIO_MOVE in this kernel; the floor uses UFFDIO_COPY");
        }
        let floor = on_cpu(handler.memory(), seed)?;
        handler.finish().context("the floor's handler failed")?;

        let area = Area::filled(PAGES.bytes(), false)?;
        migrate_all(&hmm, &area, device)?;
        let before = hmm.statistics().cpu_faults;
        let ours = on_cpu(&area, seed)?;
        let faults = hmm.statistics().cpu_faults - before;
        ensure!(
            faults * 100 >= PAGES.get() * 99,
            "{faults} faults for {PAGES} touches: something else brought pages home"
        );
        // The first round fills the caches of both.
        if round > 0 {
            p50.add(quantile(&floor, 0.50), quantile(&ours, 0.50));
            p99.add(quantile(&floor, 0.99), quantile(&ours, 0.99));
        }
    }
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![
        ("fault_4k_p50", p50.measured()),
        ("fault_4k_p99", p99.measured()),
    ]))
}

/// How long each touch takes, in microseconds.
fn touch_all(area: &Area, seed: u64) -> Vec<f64> {
    let order = shuffled(area.pages().index(), seed);
    let mut times = vec![0.0; order.len()];
    for (time, page) in times.iter_mut().zip(order) {
        let start = Instant::now();
        std::hint::black_box(area.touch(page));
        *time = start.elapsed().as_secs_f64() * 1e6;
    }
    times
}

/// Faults a second of two threads on two processors, and of one.
pub fn disjoint() -> anyhow::Result<Outcome> {
    let (hmm, device) = open()?;
    let cpus = allowed_cpus();
    let (one, two) = match cpus[..] {
        [one, two, ..] => (one, two),
        _ => bail!("two threads need two processors"),
    };
    let mut pairs = Pairs::default();
    for round in 0..=ROUNDS {
        let floor = rate(&hmm, device, &[one], round)?;
        let value = rate(&hmm, device, &[one, two], round)?;
        if round > 0 {
            pairs.add(floor, value);
        }
    }
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![(
        "fault_disjoint_2t",
        pairs.measured(),
    )]))
}

/// Faults a second, each thread on a processor of its own and with memory of
/// its own.
fn rate(hmm: &Hmm, device: DeviceId, cpus: &[usize], seed: usize) -> anyhow::Result<f64> {
    let areas = cpus.iter().map(|_| Area::filled(PAGES.bytes(), false));
    let areas: Vec<Area> = areas.collect::<Result<_, _>>()?;
    for area in &areas {
        migrate_all(hmm, area, device)?;
    }
    let barrier = Barrier::new(cpus.len() + 1);
    let elapsed = std::thread::scope(|scope| {
        let barrier = &barrier;
        let threads: Vec<_> = cpus
            .iter()
            .zip(&areas)
            .map(|(&cpu, area)| {
                scope.spawn(move || {
                    let stays = stay_on(cpu);
                    let order = shuffled(area.pages().index(), seed as u64 + 1);
                    barrier.wait();
                    for page in order {
                        std::hint::black_box(area.touch(page));
                    }
                    stays
                })
            })
            .collect();
        barrier.wait();
        let (elapsed, joined) = timed(|| {
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.collect::<Vec<_>>()
        });
        for stays in joined {
            match stays {
                Ok(stays) => stays?,
                Err(_) => bail!("a touching thread panicked"),
            }
        }
        Ok(elapsed)
    })?;
    let faults = PAGES.get() * cpus.len() as u64;
    Ok(faults as f64 / elapsed.as_secs_f64())
}

fn migrate_all(hmm: &Hmm, area: &Area, device: DeviceId) -> anyhow::Result<()> {
    let report = hmm.migrate(area.range(), device)?;
    ensure!(
        report.is_complete(),
        "not everything moved to the device: {report}"
    );
    Ok(())
}
