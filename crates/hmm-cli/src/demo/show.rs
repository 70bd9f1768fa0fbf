//! What a person or a program reads at the end.

use std::io::{self, Write};
use std::time::Duration;

use hmm::{ByteCount, DeviceId, PageCount, PageRange, Residency, StatsSnapshot};
use serde_json::json;

use super::check::Verdict;
use super::kernel::{ROUNDS, Totals};
use super::spans::Span;
use super::touch::Tally;
use crate::table::Table;

/// Cells in a line of a map, and lines of all spans together.
const MAP_WIDTH: usize = 64;
const MAP_LINES: usize = 8;
/// Spans that are drawn; the largest ones.
const SPANS_SHOWN: usize = 3;

/// Where everything was, span by span.
pub struct Maps {
    /// Before the device had seen anything.
    pub before: Vec<Residency>,
    /// In the middle of the first round.
    pub during: Vec<Residency>,
    /// After the last round.
    pub after: Vec<Residency>,
    /// After the CPU had looked at everything.
    pub home: Vec<Residency>,
}

/// All that happened.
pub struct Outcome {
    /// What to call the file.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// Length of a piece.
    pub piece_bytes: u64,
    /// Different pieces.
    pub nodes: u64,
    /// Where the structure lies.
    pub spans: Vec<Span>,
    /// The device.
    pub device: DeviceId,
    /// Its name.
    pub device_name: &'static str,
    /// Size of its memory.
    pub device_memory: ByteCount,
    /// Whether pages are moved or copied.
    pub moves_pages: bool,
    /// The engine's counters.
    pub statistics: StatsSnapshot,
    /// The device's side.
    pub report: Totals,
    /// How long device and CPU worked.
    pub elapsed: Duration,
    /// Nodes that the CPU thread read and changed meanwhile.
    pub cpu_touches: u64,
    /// Where everything was.
    pub maps: Maps,
    /// What the comparison found while the engine ran.
    pub verdict: Verdict,
    /// What the CPU thread did.
    pub tally: Vec<Tally>,
}

/// Writes the outcome; `again` is the comparison after the engine had ended.
pub fn print(outcome: &Outcome, again: &Verdict, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{:#}", as_json(outcome, again))
    } else {
        as_text(outcome, again, &mut out)
    }
}

fn as_text(outcome: &Outcome, again: &Verdict, out: &mut impl Write) -> io::Result<()> {
    let stats = &outcome.statistics;
    let pages: PageCount = outcome.spans.iter().map(|span| span.range.pages()).sum();
    writeln!(out, "{}", outcome.file)?;
    writeln!(
        out,
        "{} in pieces of {} bytes: {} different ones, {} of heap memory; {} with {}\n",
        ByteCount::new(outcome.bytes),
        outcome.piece_bytes,
        outcome.nodes,
        pages.bytes(),
        outcome.device_name,
        outcome.device_memory,
    )?;

    let mut table = Table::new(["WHAT HAPPENED", "", ""]);
    let size = |pages: u64| format!("{} pages", pages);
    let bytes = |pages: u64| PageCount::new(pages).bytes().to_string();
    for (what, count) in [
        ("to the device", stats.pages_to_device),
        ("home to system memory", stats.pages_to_system),
        ("evicted to make room", stats.evicted_pages),
    ] {
        table.row([what.to_owned(), size(count), bytes(count)]);
    }
    let microseconds = |ns: u64| format!("{:.1} us", Duration::from_nanos(ns).as_secs_f64() * 1e6);
    table.row([
        "faults of the CPU".to_owned(),
        stats.cpu_faults.to_string(),
        format!(
            "half of them served within {}, 99 of 100 within {}",
            microseconds(stats.fault_p50_ns),
            microseconds(stats.fault_p99_ns)
        ),
    ]);
    table.row([
        "faults of the device".to_owned(),
        stats.device_faults.to_string(),
        format!("and {} accesses in place", outcome.report.in_place),
    ]);
    table.row([
        "nodes the device changed".to_owned(),
        (outcome.nodes * ROUNDS as u64).to_string(),
        format!("in {ROUNDS} rounds, {:.3} s", outcome.elapsed.as_secs_f64()),
    ]);
    table.row([
        "nodes the CPU changed".to_owned(),
        outcome.cpu_touches.to_string(),
        "at the same time".to_owned(),
    ]);
    for (name, count, meaning) in stats.rows() {
        let meaning = meaning.trim();
        if count > 0 && (meaning.starts_with("Slower") || meaning.starts_with("Weaker")) {
            table.row([name.to_owned(), count.to_string(), meaning.to_owned()]);
        }
    }
    if !outcome.moves_pages {
        let note = "Slower: no UFFDIO_MOVE here, see `hmm info`";
        table.row([
            "pages are copied".to_owned(),
            String::new(),
            note.to_owned(),
        ]);
    }
    table.print(out)?;

    print_maps(outcome, out)?;
    print_verdict(&outcome.verdict, again, out)
}

fn print_maps(outcome: &Outcome, out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "\nWHERE THE PAGES WERE     . system memory   {} on the device   + some of each   ~ on the way",
        outcome.device.index()
    )?;
    let mut largest: Vec<usize> = (0..outcome.spans.len()).collect();
    largest.sort_by_key(|&span| std::cmp::Reverse(outcome.spans[span].range.pages()));
    largest.truncate(SPANS_SHOWN);
    largest.sort_unstable();
    let lines = (MAP_LINES / largest.len().max(1)).max(2);
    for (when, maps) in [
        ("before", &outcome.maps.before),
        ("during: first round half done", &outcome.maps.during),
        ("after: last round done", &outcome.maps.after),
        ("home: the CPU has compared everything", &outcome.maps.home),
    ] {
        let on_device: PageCount = maps.iter().map(|map| map.on_device(outcome.device)).sum();
        let all: PageCount = maps.iter().map(|map| map.range().pages()).sum();
        writeln!(out, "\n{when} ({on_device} of {all} pages on the device)")?;
        for map in largest.iter().filter_map(|&span| maps.get(span)) {
            if largest.len() > 1 {
                writeln!(out, "  at {}", map.range().start())?;
            }
            for line in map.lines(MAP_WIDTH, lines) {
                writeln!(out, "  {line}")?;
            }
        }
    }
    let hidden = outcome.spans.len().saturating_sub(largest.len());
    if hidden > 0 {
        writeln!(out, "\n({hidden} smaller spans of memory are not drawn)")?;
    }
    Ok(())
}

fn print_verdict(verdict: &Verdict, again: &Verdict, out: &mut impl Write) -> io::Result<()> {
    writeln!(out)?;
    if verdict.is_right() && again.is_right() {
        return writeln!(
            out,
            "RIGHT: all {} bytes of values are what the CPU computes alone; once more after the \
             engine ended.",
            verdict.compared_bytes
        );
    }
    for (when, verdict) in [("with the engine", verdict), ("after it ended", again)] {
        let first = verdict
            .first_different
            .map_or_else(String::new, |node| format!(", the first in node {node}"));
        writeln!(
            out,
            "WRONG {when}: {} of {} bytes differ{first}; {} wrong values were read meanwhile",
            verdict.different_bytes, verdict.compared_bytes, verdict.wrong_meanwhile
        )?;
    }
    Ok(())
}

fn as_json(outcome: &Outcome, again: &Verdict) -> serde_json::Value {
    let counts = |maps: &[Residency]| {
        let of = |count: fn(&Residency, DeviceId) -> PageCount| -> u64 {
            let pages: PageCount = maps.iter().map(|map| count(map, outcome.device)).sum();
            pages.get()
        };
        json!({
            "device_pages": of(Residency::on_device),
            "system_pages": of(|map, _| map.in_system()),
        })
    };
    let spans = outcome.spans.iter().map(|span| span.range);
    let statistics: serde_json::Map<_, _> = outcome
        .statistics
        .rows()
        .into_iter()
        .map(|(name, value, _)| (name.to_owned(), value.into()))
        .collect();
    json!({
        "file": outcome.file,
        "file_bytes": outcome.bytes,
        "piece_bytes": outcome.piece_bytes,
        "nodes": outcome.nodes,
        "index_pages": spans.map(PageRange::pages).sum::<PageCount>().get(),
        "device_memory_bytes": outcome.device_memory.get(),
        "moves_pages": outcome.moves_pages,
        "pages_to_device": outcome.statistics.pages_to_device,
        "pages_to_system": outcome.statistics.pages_to_system,
        "cpu_faults": outcome.statistics.cpu_faults,
        "fault_p50_ns": outcome.statistics.fault_p50_ns,
        "fault_p99_ns": outcome.statistics.fault_p99_ns,
        "device_faults": outcome.report.faults,
        "device_in_place": outcome.report.in_place,
        "device_tlb_misses": outcome.report.tlb_misses,
        "cpu_touches": outcome.cpu_touches,
        "elapsed_s": outcome.elapsed.as_secs_f64(),
        "residency": {
            "before": counts(&outcome.maps.before),
            "during": counts(&outcome.maps.during),
            "after": counts(&outcome.maps.after),
            "home": counts(&outcome.maps.home),
        },
        "statistics": statistics,
        "compared_bytes": outcome.verdict.compared_bytes,
        "different_bytes": outcome.verdict.different_bytes + again.different_bytes,
        "wrong_meanwhile": outcome.verdict.wrong_meanwhile,
        "right": outcome.verdict.is_right() && again.is_right(),
    })
}
