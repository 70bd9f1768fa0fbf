//! `hmm bench`: the engine against what the hardware and the kernel can do,
//! measured in the same run.
//!
//! Each floor is measured right before what is compared with it, several times
//! in turn, and the medians count: what slows the machine down for a while
//! slows both.

mod chase;
mod fault;
mod metadata;
mod pool;
mod row;
mod sample;
mod stream;
mod transfer;
mod vulkan;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use crate::args::BenchOptions;
use crate::table::Table;

pub use row::ROWS;
use row::{Row, Target};
use sample::Outcome;

/// Runs the command.
pub fn run(options: &BenchOptions) -> anyhow::Result<ExitCode> {
    let chosen: Vec<&Row> = ROWS
        .iter()
        .filter(|row| {
            if options.names.is_empty() {
                row.group.is_vulkan() == options.device.is_vulkan()
            } else {
                options.names.iter().any(|name| name == row.name)
            }
        })
        .collect();
    let mut out = io::stdout().lock();
    if options.list {
        list(&chosen, &mut out)?;
        return Ok(ExitCode::SUCCESS);
    }
    let watched = io::stderr().is_terminal();
    let mut table = Table::new(["ROW", "VALUE", "FLOOR", "RATIO", "TARGET", "", "WHAT"]);
    let mut missed = 0;
    let mut group = None;
    let mut results = Outcome::Measured(Vec::new());
    let mut skipped = 0;
    for row in &chosen {
        if group != Some(row.group) {
            if watched {
                eprintln!("measuring {}...", row.name);
            }
            results = row.group.measure()?;
            group = Some(row.group);
        }
        let measured = match &results {
            Outcome::Measured(measured) => measured,
            Outcome::Skipped(why) => {
                skipped += 1;
                if options.json {
                    writeln!(out, "{}", serde_json::to_string(&row.skipped(why))?)?;
                } else {
                    table.row(row.cells_skipped(why));
                }
                continue;
            }
        };
        let found = measured.iter().find(|(name, _)| *name == row.name);
        let measured = found.map(|(_, measured)| *measured);
        let measured = measured.ok_or_else(|| anyhow::anyhow!("{} was not measured", row.name))?;
        missed += usize::from(!row.is_ok(measured));
        if options.json {
            writeln!(out, "{}", serde_json::to_string(&row.result(measured))?)?;
        } else {
            table.row(row.cells(measured));
        }
    }
    if !options.json {
        table.print(&mut out)?;
        writeln!(
            out,
            "\n{} of {} rows reach their target.",
            chosen.len() - missed - skipped,
            chosen.len()
        )?;
        if skipped > 0 {
            writeln!(out, "{skipped} cannot be measured here.")?;
        }
        if cfg!(debug_assertions) {
            writeln!(
                out,
                "This is a debug build: measure with `cargo run --release -- bench`."
            )?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(rows: &[&Row], out: &mut impl Write) -> io::Result<()> {
    let mut table = Table::new(["ROW", "UNIT", "TARGET", "WHAT"]);
    for row in rows {
        let target = match row.target {
            Target::AtMost(most) => format!("at most {most}"),
            Target::AtLeast(least) => format!("at least {least}"),
        };
        let cells = [row.name, row.unit, &target, row.what];
        table.row(cells.map(str::to_owned));
    }
    table.print(out)
}
