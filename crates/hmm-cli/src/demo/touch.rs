//! The CPU thread that looks up, reads and changes nodes while the device does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hmm::Residency;

use super::Demo;
use super::kernel::PROGRESS;

/// Nodes visited between two pauses.
const BURST: usize = 16;
/// The pause: the point is work at the same time, not the most of it.
const PAUSE: Duration = Duration::from_micros(200);

/// Stops the work; static for the reason that `PROGRESS` is.
static STOP: AtomicBool = AtomicBool::new(false);

/// The thread's work.
pub struct Toucher<'a> {
    demo: &'a Demo<'a>,
    /// Set when it is to end.
    pub stop: &'static AtomicBool,
}

/// What it did.
pub struct Touched {
    /// Visits.
    pub count: u64,
    /// Visits of each node, and the last note left there.
    pub tally: Vec<Tally>,
    /// Digests seen that no round computes: stale or torn data.
    pub wrong: u64,
    /// Where everything was in the middle of the first round.
    pub during: Vec<Residency>,
}

/// What the thread did to one node.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// How often it counted up `hits`.
    pub visits: u64,
    /// What it wrote last into `note`.
    pub note: u64,
    /// Highest round whose digest was seen.
    round: usize,
}

impl<'a> Toucher<'a> {
    /// A thread's work on the nodes of `demo`.
    pub fn new(demo: &'a Demo<'a>) -> Self {
        STOP.store(false, Ordering::Release);
        Self { demo, stop: &STOP }
    }

    /// Works until told to stop, and at least one burst.
    pub fn work(&self) -> Result<Touched, hmm::Error> {
        let index = self.demo.index;
        let nodes = index.nodes.len();
        let mut touched = Touched {
            count: 0,
            tally: vec![Tally::default(); nodes],
            wrong: 0,
            during: Vec::new(),
        };
        let mut random = 0x2545_F491_4F6C_DD1D_u64;
        loop {
            for _ in 0..BURST {
                random = xorshift(random);
                self.visit(&mut touched, random);
            }
            let progress = PROGRESS.load(Ordering::Relaxed);
            self.demo.bar.set_position(progress);
            let stop = self.stop.load(Ordering::Acquire);
            if touched.during.is_empty() && (stop || progress >= nodes as u64 / 2) {
                touched.during = self.demo.residency()?;
            }
            if stop {
                return Ok(touched);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Looks a node up by its text and reads and changes it.
    fn visit(&self, touched: &mut Touched, random: u64) {
        let index = self.demo.index;
        let at = usize::try_from(random % index.nodes.len() as u64).unwrap_or(0);
        let node = &index.nodes[at];
        let tally = &mut touched.tally[at];
        let digest = node.digest.load(Ordering::SeqCst);
        let found = index.by_text.get(node.text.as_slice()) == Some(&at);
        match self.demo.expected.round_of(at, digest) {
            // Digests only go forward, and what was seen once stays.
            Some(round) if found && round >= tally.round => tally.round = round,
            _ => touched.wrong += 1,
        }
        touched.wrong += u64::from(node.note.load(Ordering::Relaxed) != tally.note);
        node.note.store(random, Ordering::Relaxed);
        increment(&node.hits);
        tally.note = random;
        tally.visits += 1;
        touched.count += 1;
    }
}

fn increment(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::SeqCst);
}

/// The next pseudo-random number.
const fn xorshift(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    state
}
