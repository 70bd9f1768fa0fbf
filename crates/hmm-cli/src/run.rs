//! `hmm run`: another program, with virtual devices.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

use crate::args::RunOptions;

/// The library that gives a program its devices.
const SHIM: &str = "libhmm_shim.so";
/// Where it is, for an installation that has it elsewhere.
const SHIM_VARIABLE: &str = "HMM_SHIM";

/// Becomes the program.
pub fn run(options: &RunOptions) -> anyhow::Result<ExitCode> {
    let shim = find_shim()?;
    let [program, arguments @ ..] = &options.command[..] else {
        bail!("no program was named");
    };
    let mut command = Command::new(program);
    if options.report {
        command.env("HMM_SHIM_REPORT", "1");
    }
    let error = command
        .args(arguments)
        .env("LD_PRELOAD", preload(&shim, env::var_os("LD_PRELOAD")))
        .env("HMM_DEVICE_MEMORY", options.device_memory.to_string())
        .exec();
    eprintln!(
        "hmm: cannot start {}: {error}",
        Path::new(program).display()
    );
    Ok(ExitCode::from(127))
}

/// The library, before what is preloaded already.
fn preload(shim: &Path, others: Option<OsString>) -> OsString {
    let mut list = shim.as_os_str().to_owned();
    if let Some(others) = others.filter(|others| !others.is_empty()) {
        list.push(":");
        list.push(others);
    }
    list
}

fn find_shim() -> anyhow::Result<PathBuf> {
    if let Some(path) = env::var_os(SHIM_VARIABLE) {
        return Ok(path.into());
    }
    let here = env::current_exe().context("cannot find this program's own directory")?;
    let beside = here.with_file_name(SHIM);
    if !beside.exists() {
        bail!(
            "{} is not there; `cargo build --release -p hmm-shim` makes it, or {SHIM_VARIABLE} \
             says where it is",
            beside.display()
        );
    }
    Ok(beside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_libraries_stay_preloaded() {
        let shim = Path::new("/a/libhmm_shim.so");
        assert_eq!(preload(shim, None), "/a/libhmm_shim.so");
        assert_eq!(preload(shim, Some("".into())), "/a/libhmm_shim.so");
        assert_eq!(
            preload(shim, Some("/b.so".into())),
            "/a/libhmm_shim.so:/b.so"
        );
    }
}
