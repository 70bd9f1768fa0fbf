//! x
use std::process::ExitCode;
pub struct R { pub name: &'static str }
pub const ROWS: &[R] = &[R{name:"a"}];
pub fn run(_: &crate::args::BenchOptions) -> anyhow::Result<ExitCode> { todo!() }
