//! What a person or a program reads at the end.

use std::io::{self, Write};
use std::time::Duration;

use hmm::{ByteCount, PageCount};
use serde_json::{Value, json};

/// Cells of the longest bar.
const BAR: f64 = 30.0;

/// One launch.
#[derive(Debug)]
pub struct Level {
    /// Vertices that are at this level: those whose neighbours it looked at.
    pub vertices: u64,
    pub dispatches: u64,
    /// Those of them that ran invocations again whose pages had been missing.
    pub repeats: u64,
    pub pages_to_device: u64,
    pub evicted_pages: u64,
    pub elapsed: Duration,
}

/// All that happened.
#[derive(Debug)]
pub struct Outcome {
    pub vertices: u32,
    pub edges: u64,
    pub bytes: ByteCount,
    pub source: u32,
    pub device: String,
    pub memory: ByteCount,
    pub levels: Vec<Level>,
    /// What the CPU alone takes.
    pub cpu: Duration,
    pub pages_to_system: u64,
    /// Vertices that have another level than the CPU has found.
    pub wrong: u64,
    /// Whether the graph is what it was.
    pub graph_is_whole: bool,
}

impl Outcome {
    pub fn is_right(&self) -> bool {
        self.wrong == 0 && self.graph_is_whole
    }

    pub fn sum(&self, of: fn(&Level) -> u64) -> u64 {
        self.levels.iter().map(of).sum()
    }

    fn elapsed(&self) -> Duration {
        self.levels.iter().map(|level| level.elapsed).sum()
    }

    pub fn print(&self, json: bool) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if json {
            return writeln!(out, "{:#}", self.as_json());
        }
        let times = self.bytes.get() as f64 / self.memory.get() as f64;
        writeln!(
            out,
            "{} vertices, {} edges: {} in ordinary Vecs\n{} with {} of memory: the graph is \
             {times:.1} times as large\n",
            self.vertices, self.edges, self.bytes, self.device, self.memory
        )?;
        writeln!(
            out,
            "LEVEL   VERTICES   TO DEVICE     EVICTED  DISPATCHES      TIME"
        )?;
        let slowest = self.levels.iter().map(|level| level.elapsed).max();
        let slowest = slowest.unwrap_or_default().as_secs_f64();
        for (number, level) in self.levels.iter().enumerate() {
            let time = level.elapsed.as_secs_f64();
            let filled = (time / slowest * BAR).ceil();
            let bar: String = (0..32u8)
                .take_while(|&cell| f64::from(cell) < filled)
                .map(|_| '#')
                .collect();
            writeln!(
                out,
                "{number:5} {:10} {:>11} {:>11} {:11} {time:7.3} s  {bar}",
                level.vertices,
                size(level.pages_to_device),
                size(level.evicted_pages),
                level.dispatches,
            )?;
        }
        writeln!(
            out,
            "  all {:10} {:>11} {:>11} {:11} {:7.3} s  ({:.3} s on the CPU alone)\n",
            self.sum(|level| level.vertices),
            size(self.sum(|level| level.pages_to_device)),
            size(self.sum(|level| level.evicted_pages)),
            self.sum(|level| level.dispatches),
            self.elapsed().as_secs_f64(),
            self.cpu.as_secs_f64(),
        )?;
        if self.is_right() {
            writeln!(
                out,
                "RIGHT: all {} levels are what the CPU finds alone, and the graph is what it was.",
                self.vertices
            )
        } else {
            let graph = if self.graph_is_whole { "" } else { "not " };
            writeln!(
                out,
                "WRONG: {} of {} vertices have another level than the CPU finds; the graph is \
                 {graph}what it was.",
                self.wrong, self.vertices
            )
        }
    }

    fn as_json(&self) -> Value {
        let level = |level: &Level| {
            json!({
                "vertices": level.vertices,
                "dispatches": level.dispatches,
                "repeats": level.repeats,
                "pages_to_device": level.pages_to_device,
                "evicted_pages": level.evicted_pages,
                "elapsed_s": level.elapsed.as_secs_f64(),
            })
        };
        json!({
            "vertices": self.vertices,
            "edges": self.edges,
            "bytes": self.bytes.get(),
            "source": self.source,
            "device": self.device,
            "device_memory_bytes": self.memory.get(),
            "levels": self.levels.iter().map(level).collect::<Vec<_>>(),
            "dispatches": self.sum(|level| level.dispatches),
            "pages_to_device": self.sum(|level| level.pages_to_device),
            "pages_to_system": self.pages_to_system,
            "evicted_pages": self.sum(|level| level.evicted_pages),
            "elapsed_s": self.elapsed().as_secs_f64(),
            "cpu_elapsed_s": self.cpu.as_secs_f64(),
            "wrong_vertices": self.wrong,
            "graph_is_whole": self.graph_is_whole,
            "right": self.is_right(),
        })
    }
}

/// The size of so many pages.
fn size(pages: u64) -> String {
    PageCount::new(pages).bytes().to_string()
}
