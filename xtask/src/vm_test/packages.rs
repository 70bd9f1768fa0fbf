//! Debian packages, downloaded and unpacked into a folder, never installed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::apt::{Apt, Package};
use crate::process::Invocation;

/// Puts the files of all packages into one tree, which is there as a whole or
/// not at all. What is there already is not downloaded again.
pub fn unpack(apt: &Apt, packages: &[Package], tree: &Path, keep: bool) -> Result<()> {
    if tree.exists() {
        return Ok(());
    }
    let partial = tree.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    let files = partial.join("files");
    fs::create_dir_all(&files)?;
    for package in packages {
        eprintln!("getting {}", package.file);
        apt.download(package, &partial)?;
        let file = partial.join(&package.file);
        Invocation::new("dpkg-deb")
            .args([Path::new("--extract"), &file, &files])
            .output()?;
        if keep {
            let kept = tree.parent().context("a tree is in a folder")?;
            fs::rename(&file, kept.join(&package.file))?;
        }
    }
    fs::rename(&files, tree)?;
    fs::remove_dir_all(&partial)?;
    Ok(())
}

/// All files below a folder, without following links.
pub fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}
