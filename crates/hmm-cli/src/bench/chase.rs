//! `device_chase`: a kernel follows pointers in device memory, each to a cache
//! line that nothing could have fetched before.

use hmm::Pointer;

use super::sample::{Outcome, Pairs, ROUNDS, below, timed, xorshift};
use super::transfer::{SIZE, finds, open, to};
use crate::floor::Area;

/// Words from one node to the next: a cache line.
const NODE_WORDS: usize = 8;
/// Hops of one measurement.
const HOPS: usize = 1 << 20;

/// One kernel on one worker, against one thread on the same memory at home.
pub fn chase() -> anyhow::Result<Outcome> {
    let (hmm, device) = open(1)?;
    let mut area = Area::new(SIZE, false)?;
    link(area.words_mut());
    let base = Pointer::of(area.words().as_ptr());
    let mut pairs = Pairs::default();
    for round in 0..=ROUNDS {
        to(&hmm, &area, None)?;
        let (time, right) = timed(|| follow(area.words()));
        let floor = time.as_secs_f64() * 1e9 / HOPS as f64;

        to(&hmm, &area, Some(device.id()))?;
        let report = finds(&device, right, |context| {
            let mut at = 0u64;
            for _ in 0..HOPS {
                at = context.load(base.at(index(at)))?;
            }
            Ok(at)
        })?;
        if round > 0 {
            pairs.add(floor, report.elapsed.as_secs_f64() * 1e9 / HOPS as f64);
        }
    }
    hmm.shutdown()?;
    Ok(Outcome::Measured(vec![(
        "device_chase",
        pairs.measured_inverse(),
    )]))
}

/// Links all nodes to one cycle in random order: Sattolo's shuffle.
fn link(words: &mut [u64]) {
    let nodes = words.len() / NODE_WORDS;
    for node in 0..nodes {
        words[node * NODE_WORDS] = (node * NODE_WORDS) as u64;
    }
    let mut random = 0x2545_F491_4F6C_DD1D;
    for last in (1..nodes).rev() {
        random = xorshift(random);
        words.swap(last * NODE_WORDS, below(random, last) * NODE_WORDS);
    }
}

/// Where the chase gets to, on the CPU.
fn follow(words: &[u64]) -> u64 {
    let mut at = 0;
    for _ in 0..HOPS {
        at = words[index(at)];
    }
    at
}

/// A word that was read, as an index; lossless on 64-bit machines.
fn index(word: u64) -> usize {
    usize::try_from(word).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cycle_visits_every_node() {
        let mut words = vec![0; 1000 * NODE_WORDS];
        link(&mut words);
        let mut at = 0;
        let mut hops = 0;
        loop {
            at = words[index(at)];
            hops += 1;
            if at == 0 {
                break;
            }
        }
        assert_eq!(hops, 1000);
    }
}
