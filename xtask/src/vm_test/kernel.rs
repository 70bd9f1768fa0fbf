//! A stock kernel of Debian: its image, and the modules that the guest needs.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::packages::{files_below, unpack};
use crate::apt::{Apt, Package};
use crate::process::Invocation;

/// The package that depends on a suite's newest kernel.
const METAPACKAGE: &str = "linux-image-amd64";
/// Where the newest kernel may be.
const NEWEST: [&str; 3] = ["trixie-backports", "sid", "experimental"];
/// Since the split of the kernel's package these belong to it.
const PARTS: [&str; 2] = ["linux-binary-", "linux-modules-"];

/// What a guest needs besides what is built into the kernel: persistent memory
/// of two kinds, a disk, and file systems. What they depend on comes along.
const MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_blk",
    // The file systems ask for these by other names.
    "crc32c_generic",
    "libcrc32c",
    "nfit",
    "nd_pmem",
    "virtio_pmem",
    "ext4",
    "xfs",
];

/// Which kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Which {
    /// Debian 12's own, Linux 6.1.
    Bookworm,
    /// The newest that the mirror has.
    Newest,
}

/// A kernel, unpacked.
#[derive(Debug)]
pub struct Kernel {
    /// That of its package.
    pub version: String,
    tree: PathBuf,
}

/// A module's file, uncompressed.
#[derive(Debug)]
pub struct Module {
    pub name: String,
    pub content: Vec<u8>,
}

impl Kernel {
    /// Downloads it into the folder, if it is not there yet.
    pub fn provide(which: Which, folder: &Path, lists: &Path, keep: bool) -> Result<Self> {
        let (apt, package) = match which {
            Which::Bookworm => candidate(lists, "bookworm")?,
            Which::Newest => newest(lists)?,
        };
        let mut packages = vec![package];
        for name in apt.dependencies(&packages[0].name)? {
            if PARTS.iter().any(|part| name.starts_with(part)) {
                packages.push(apt.package(&name)?);
            }
        }
        let version = packages[0].version.clone();
        let tree = folder.join(&version);
        fs::create_dir_all(folder)?;
        unpack(&apt, &packages, &tree, keep)?;
        Ok(Self { version, tree })
    }

    /// The part of the version that is Linux's own.
    pub fn linux(&self) -> &str {
        self.version.split(['-', '~', '+']).next().unwrap_or("?")
    }

    /// What the machine starts.
    pub fn image(&self) -> Result<PathBuf> {
        files_below(&self.tree)?
            .into_iter()
            .find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("vmlinuz")
            })
            .with_context(|| format!("the packages of Linux {} have no image", self.version))
    }

    /// The modules in the order in which they can be loaded. Those that are not
    /// there are taken to be built in.
    pub fn modules(&self) -> Result<Vec<Module>> {
        let files = files_below(&self.tree)?
            .into_iter()
            .filter_map(|path| Some((module_name(&path)?, path)))
            .collect();
        let mut modules = Vec::new();
        for name in MODULES {
            add(name, &files, &mut modules)?;
        }
        Ok(modules)
    }
}

/// A suite's newest kernel.
fn candidate(lists: &Path, suite: &str) -> Result<(Apt, Package)> {
    let apt = Apt::of_suite(lists, suite)?;
    let name = apt
        .dependencies(METAPACKAGE)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{METAPACKAGE} of {suite} brings no kernel"))?;
    let package = apt.package(&name)?;
    Ok((apt, package))
}

/// The newest of several suites'; a mirror need not have all.
fn newest(lists: &Path) -> Result<(Apt, Package)> {
    let mut best: Option<(Apt, Package)> = None;
    let mut reason = None;
    for suite in NEWEST {
        match candidate(lists, suite) {
            Ok(found) => {
                let newer = best
                    .as_ref()
                    .is_none_or(|(_, package)| is_newer(&found.1.version, &package.version));
                if newer {
                    best = Some(found);
                }
            }
            Err(error) => reason = Some(error),
        }
    }
    match (best, reason) {
        (Some(best), _) => Ok(best),
        (None, Some(reason)) => Err(reason),
        (None, None) => bail!("no suite was looked at"),
    }
}

fn is_newer(version: &str, than: &str) -> bool {
    Invocation::new("dpkg")
        .args(["--compare-versions", version, "gt", than])
        .quiet()
        .is_some()
}

/// `nd_pmem` of `nd_pmem.ko` or `nd-pmem.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (name, _) = name.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

fn add(name: &str, files: &HashMap<String, PathBuf>, modules: &mut Vec<Module>) -> Result<()> {
    if modules.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let Some(path) = files.get(name) else {
        return Ok(());
    };
    let content = read(path)?;
    for needed in depends(&content) {
        add(&needed, files, modules)?;
    }
    modules.push(Module {
        name: name.to_owned(),
        content,
    });
    Ok(())
}

/// Newer kernels have their modules compressed.
fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let output = Invocation::new("xz")
        .args([Path::new("--decompress"), Path::new("--stdout"), path])
        .into_command()
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run xz; install the package xz-utils")?;
    if !output.status.success() {
        bail!("xz cannot read {}", path.display());
    }
    Ok(output.stdout)
}

/// What a module says about itself: `depends=a,b`, between zero bytes.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|bytes| bytes == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|&byte| byte == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_say_what_they_need() {
        assert_eq!(
            depends(b"ELF\0license=GPL\0depends=jbd2,nd-btt\0x=y\0"),
            ["jbd2", "nd_btt"]
        );
        assert!(depends(b"ELF\0depends=\0x").is_empty());
        assert!(depends(b"ELF").is_empty());
    }

    #[test]
    fn names_of_modules() {
        let name = |path| module_name(Path::new(path));
        assert_eq!(
            name("a/crc32c-intel.ko.xz").as_deref(),
            Some("crc32c_intel")
        );
        assert_eq!(name("a/ext4.ko").as_deref(), Some("ext4"));
        assert_eq!(name("a/vmlinuz"), None);
    }

    #[test]
    fn versions_compare_as_debian_does() {
        assert!(is_newer("7.3.4-1~bpo13+1", "7.3~rc7-1~exp1"));
        assert!(!is_newer("7.2.13-1", "7.3~rc7-1~exp1"));
    }
}
