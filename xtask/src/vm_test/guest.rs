//! What the guest finds: tools, modules, tests, and the plan of what to run.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::archive::Archive;
use super::kernel::Kernel;
use super::plan::Plan;
use super::tools::Tools;
use crate::process::Invocation;

const INIT: &str = include_str!("init.sh");
/// The kernel writes to it before anything is mounted.
const CONSOLE: (u32, u32) = (5, 1);

/// Writes the guest's first file system for one kernel.
pub fn write(to: &Path, kernel: &Kernel, tools: &Tools, plan: &Plan) -> Result<()> {
    let file = File::create(to).with_context(|| format!("cannot make {}", to.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    archive.directory("dev")?;
    archive.device("dev/console", CONSOLE)?;
    archive.file("init", INIT.as_bytes())?;
    archive.copy("bin/busybox", tools.busybox()?)?;
    archive.copy("etc/mke2fs.conf", tools.settings()?)?;

    let mut libraries = BTreeMap::<String, PathBuf>::new();
    for maker in tools.makers()? {
        let name = maker.file_name().unwrap_or_default().to_string_lossy();
        archive.copy(&format!("tools/{name}"), maker)?;
        libraries.extend(tools.libraries(maker)?);
    }
    let bare = to.with_extension("stripped");
    let tests = plan
        .binaries
        .iter()
        .map(|binary| (format!("tests/{}", binary.name), &binary.path));
    for (path, program) in tests.chain([("bin/hmm".to_owned(), &plan.program)]) {
        strip(program, &bare)?;
        archive.copy(&path, &bare)?;
        libraries.extend(tools.libraries(program)?);
    }
    fs::remove_file(&bare)?;
    for (name, file) in &libraries {
        // The loader is named with its path, the others are searched for.
        let path = match name.strip_prefix('/') {
            Some(path) => path.to_owned(),
            None => format!("lib/{name}"),
        };
        archive.copy(&path, file)?;
    }

    let mut order = String::new();
    for module in kernel.modules()? {
        order += &format!("{}\n", module.name);
        archive.file(&format!("modules/{}.ko", module.name), &module.content)?;
    }
    archive.file("modules/order", order.as_bytes())?;
    archive.file("plan", plan.lines().as_bytes())?;
    archive.finish()
}

/// Test programs are mostly what debuggers want to know.
fn strip(program: &Path, to: &Path) -> Result<()> {
    Invocation::new("strip")
        .args([Path::new("--strip-debug"), Path::new("-o"), to, program])
        .output()
        .context("install the package binutils")?;
    Ok(())
}
