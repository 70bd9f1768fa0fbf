//! `hmm demo`: a device walks and changes a pointer-rich index of a real file.
//!
//! | file | is about |
//! |---|---|
//! | `input` | the file |
//! | `index` | the structure in ordinary heap memory |
//! | `digest` | what is computed, on either side |
//! | `device` | the device: software or Vulkan |
//! | `kernel` | the device's side, in software |
//! | `walk.comp` | the same as a compute shader |
//! | `touch` | the CPU thread that works on the nodes meanwhile |
//! | `check` | the same computation on the CPU alone, and the comparison |
//! | `spans` | which pages the structure is on |
//! | `show` | what a person or a program reads at the end |

mod check;
mod device;
mod digest;
mod index;
mod input;
mod kernel;
mod show;
mod spans;
mod touch;

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context as _, bail};
use hmm::{ByteCount, Hmm, Residency};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::DemoOptions;
use check::Expected;
use device::Walker;
use index::Index;
use kernel::{PROGRESS, ROUNDS};
use show::{Maps, Outcome};
use spans::Span;

/// Runs the command.
pub fn run(options: &DemoOptions) -> anyhow::Result<ExitCode> {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template(
        "{spinner} {msg} {wide_bar} {percent:>3}%",
    )?);
    bar.set_message("reading");
    let input = input::read(options.file.as_deref())?;
    bar.set_message("indexing");
    let index = Index::build(&input.bytes);
    bar.set_message("computing on the CPU alone");
    let expected = Expected::compute(&index, &input.bytes);

    let hmm = Hmm::open().context("cannot open the engine; `hmm info` shows what is missing")?;
    let memory = ByteCount::mib(options.device_memory);
    let device = Walker::open(&hmm, &options.device, memory)?;
    let demo = Demo {
        hmm: &hmm,
        device: &device,
        index: &index,
        expected: &expected,
        spans: spans::of(&index),
        bar: &bar,
    };
    let outcome = demo.run(&input)?;
    bar.finish_and_clear();
    let verdict = outcome.verdict.is_right();
    hmm.shutdown()?;
    // Home for good: the engine is gone, and the data must be there still.
    let again = expected.compare(&index, &outcome.tally);
    show::print(&outcome, &again, options.json)?;
    Ok(if verdict && again.is_right() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Everything that one run needs.
struct Demo<'a> {
    hmm: &'a Hmm,
    device: &'a Walker,
    index: &'a Index<'a>,
    expected: &'a Expected,
    spans: Vec<Span>,
    bar: &'a ProgressBar,
}

impl Demo<'_> {
    fn run(&self, input: &input::Input) -> anyhow::Result<Outcome> {
        let steps = (self.index.nodes.len() * ROUNDS) as u64;
        self.bar.set_length(steps);
        self.bar.set_message("device and CPU at work");
        let before = self.residency()?;
        let start = Instant::now();
        let toucher = touch::Toucher::new(self);
        let (launched, touched) = std::thread::scope(|scope| {
            let handle = scope.spawn(|| toucher.work());
            let launched = self.launch_all();
            toucher.stop.store(true, Ordering::Release);
            (launched, handle.join())
        });
        let Ok(touched) = touched else {
            bail!("the CPU thread panicked");
        };
        let report = launched?;
        let elapsed = start.elapsed();
        let touched = touched?;
        let after = self.residency()?;
        self.bar.set_message("comparing");
        let mut verdict = self.expected.compare(self.index, &touched.tally);
        verdict.wrong_meanwhile = touched.wrong;
        let statistics = self.hmm.statistics();
        let home = self.residency()?;
        Ok(Outcome {
            file: input.name.clone(),
            bytes: input.bytes.len() as u64,
            piece_bytes: self.index.piece_bytes as u64,
            nodes: self.index.nodes.len() as u64,
            spans: self.spans.clone(),
            device: self.device.id(),
            device_name: self.device.name(),
            device_memory: self.device.memory(),
            moves_pages: self.hmm.moves_pages(),
            statistics,
            report,
            elapsed,
            cpu_touches: touched.count,
            maps: Maps {
                before,
                during: touched.during,
                after,
                home,
            },
            verdict,
            tally: touched.tally,
        })
    }

    /// Hands the head of each list to the device, once a round.
    fn launch_all(&self) -> anyhow::Result<kernel::Totals> {
        PROGRESS.store(0, Ordering::Relaxed);
        let mut totals = kernel::Totals::default();
        for round in 0..ROUNDS as u64 {
            self.device.walk(self.index, round, &mut totals)?;
        }
        Ok(totals)
    }

    /// Where the structure is now.
    fn residency(&self) -> Result<Vec<Residency>, hmm::Error> {
        let spans = self.spans.iter();
        spans.map(|span| self.hmm.residency(span.range)).collect()
    }
}
