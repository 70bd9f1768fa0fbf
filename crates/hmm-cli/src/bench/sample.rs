//! Numbers, and what is made of them.

use std::time::{Duration, Instant};

/// How often each row and its floor are measured.
pub const ROUNDS: usize = 7;

/// What a row came to.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// The engine's number.
    pub value: f64,
    /// What it is compared with.
    pub floor: Option<f64>,
    /// The comparison.
    pub ratio: Option<f64>,
}

/// What measuring a group of rows came to.
#[derive(Debug)]
pub enum Outcome {
    /// Each row's name and numbers.
    Measured(Vec<(&'static str, Measured)>),
    /// It cannot be measured here: why, and what to do.
    Skipped(String),
}

/// Pairs of floor and value, each pair measured in one go.
#[derive(Debug, Default)]
pub struct Pairs {
    floors: Vec<f64>,
    values: Vec<f64>,
}

impl Pairs {
    /// Adds a pair.
    pub fn add(&mut self, floor: f64, value: f64) {
        self.floors.push(floor);
        self.values.push(value);
    }

    /// Medians: of the values, of the floors, and of value / floor, as what is measured
    /// together is disturbed together.
    pub fn measured(&self) -> Measured {
        let pairs = self.values.iter().zip(&self.floors);
        let ratios: Vec<f64> = pairs.map(|(value, floor)| value / floor).collect();
        Measured {
            value: median(&self.values),
            floor: Some(median(&self.floors)),
            ratio: Some(median(&ratios)),
        }
    }

    /// Medians, and floor / value: of times, so that more is better.
    pub fn measured_inverse(&self) -> Measured {
        let measured = self.measured();
        Measured {
            ratio: measured.ratio.map(f64::recip),
            ..measured
        }
    }
}

/// The middle one; not a number when there is none.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// What `fraction` of the values do not exceed.
pub fn quantile(values: &[f64], fraction: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a fraction of a length is a small number that is not negative"
    )]
    let rank = (sorted.len() as f64 * fraction).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or(f64::NAN)
}

/// How long something takes.
pub fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed(), result)
}

/// Billions of bytes a second.
pub fn gb_per_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e9 / time.as_secs_f64()
}

/// The numbers below `count` in an order that looks random and is the same in
/// every run with this seed.
pub fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let mut random = seed | 1;
    for last in (1..count).rev() {
        random = xorshift(random);
        order.swap(last, below(random, last + 1));
    }
    order
}

/// A random number below `bound`.
pub fn below(random: u64, bound: usize) -> usize {
    usize::try_from(random % bound as u64).unwrap_or(0)
}

/// The next pseudo-random number.
pub const fn xorshift(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(median(&values), 50.0);
        assert_eq!(quantile(&values, 0.99), 99.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn shuffling_keeps_every_number() {
        let mut order = shuffled(1000, 7);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }
}
