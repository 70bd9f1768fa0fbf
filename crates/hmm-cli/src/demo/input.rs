//! The file.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use hmm::ByteCount;

/// Largest file: the index takes several times its size in memory.
const MOST_BYTES: u64 = 1 << 30;

/// A file's content.
#[derive(Debug)]
pub struct Input {
    /// What to call it.
    pub name: String,
    /// All of it.
    pub bytes: Vec<u8>,
}

/// Reads `file`, or this program's own executable.
pub fn read(file: Option<&Path>) -> anyhow::Result<Input> {
    let path = file.unwrap_or_else(|| Path::new("/proc/self/exe"));
    let name = match file {
        Some(path) => path.display().to_string(),
        None => fs::read_link(path).map_or_else(
            |_| path.display().to_string(),
            |path| format!("{} (this program)", path.display()),
        ),
    };
    // What it is comes first: opening a pipe would wait for a writer.
    let metadata = fs::metadata(path).with_context(|| format!("cannot read {name}"))?;
    if metadata.is_dir() {
        bail!("{name} is a directory; name a file in it");
    }
    if !metadata.is_file() {
        bail!("{name} is no regular file; copy what it gives into a file first");
    }
    check_size(&name, metadata.len())?;
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes))
        .with_context(|| format!("cannot read {name}"))?;
    check_size(&name, bytes.len() as u64)?;
    if bytes.is_empty() {
        bail!("{name} is empty; there is nothing to index");
    }
    Ok(Input { name, bytes })
}

fn check_size(name: &str, bytes: u64) -> anyhow::Result<()> {
    if bytes > MOST_BYTES {
        bail!(
            "{name} is too large: {} of at most {}; the index takes several times that in memory",
            ByteCount::new(bytes),
            ByteCount::new(MOST_BYTES)
        );
    }
    Ok(())
}
