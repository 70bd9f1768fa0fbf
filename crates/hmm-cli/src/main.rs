//! The command `hmm`: what this machine offers, a demonstration on a real
//! file, and benchmarks against what the hardware and the kernel can do.
//!
//! Everything it does with devices goes through the public library. The only
//! unsafe code is in [`floor`] (the benchmarks' own memory and the barest
//! userfaultfd handler, which the library is measured against) and in [`shader`].
#![deny(unsafe_code)]

mod args;
mod bench;
mod demo;
#[allow(
    unsafe_code,
    reason = "floors are measured with raw system calls, below any library"
)]
mod floor;
mod info;
mod memory;
mod run;
#[allow(
    unsafe_code,
    reason = "drivers do not check the shaders that they are given"
)]
mod shader;
mod table;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use args::{Arguments, Command};

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Info(options) => info::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Run(options) => run::run(&options),
        Command::Bench(options) => bench::run(&options),
    };
    match result.and_then(|code| Ok(io::stdout().flush().map(|()| code)?)) {
        Ok(code) => code,
        // Whoever read the output has seen enough: `hmm info | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
