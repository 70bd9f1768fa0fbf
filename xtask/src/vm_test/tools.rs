//! The programs of the guest that are not this project's own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::packages::{files_below, unpack};
use crate::apt::Apt;
use crate::process::Invocation;

/// Makers of file systems that Linux 6.1 can mount: newer ones switch on
/// features that it does not know.
const SUITE: &str = "bookworm";
const PACKAGES: [&str; 3] = ["busybox-static", "e2fsprogs", "xfsprogs"];
/// Of the system instead, as the tests need it.
const C_LIBRARY: &str = "libc6";
const PROGRAMS: [&str; 2] = ["mke2fs", "mkfs.xfs"];

/// The packages, unpacked.
#[derive(Debug)]
pub struct Tools {
    files: Vec<PathBuf>,
}

impl Tools {
    pub fn provide(folder: &Path, lists: &Path, keep: bool) -> Result<Self> {
        let apt = Apt::of_suite(lists, SUITE)?;
        let mut names: Vec<_> = PACKAGES.map(str::to_owned).to_vec();
        for package in PACKAGES {
            let libraries = apt.dependencies(package)?;
            let wanted = libraries
                .into_iter()
                .filter(|name| name.starts_with("lib") && name != C_LIBRARY);
            names.extend(wanted);
        }
        names.sort();
        names.dedup();
        let packages: Vec<_> = names
            .iter()
            .map(|name| apt.package(name))
            .collect::<Result<_>>()?;
        let version = packages
            .iter()
            .find(|package| package.name == PACKAGES[2])
            .context("apt names no xfsprogs")?;
        let tree = folder.join(&version.version);
        fs::create_dir_all(folder)?;
        unpack(&apt, &packages, &tree, keep)?;
        Ok(Self {
            files: files_below(&tree)?,
        })
    }

    /// A file of that name.
    fn named(&self, name: &str) -> Result<&Path> {
        self.files
            .iter()
            .find(|path| path.file_name().is_some_and(|found| found == name))
            .map(PathBuf::as_path)
            .with_context(|| format!("{PACKAGES:?} have no {name}"))
    }

    pub fn busybox(&self) -> Result<&Path> {
        self.named("busybox")
    }

    /// What a maker of file systems goes by.
    pub fn settings(&self) -> Result<&Path> {
        self.named("mke2fs.conf")
    }

    /// What makes file systems.
    pub fn makers(&self) -> Result<Vec<&Path>> {
        PROGRAMS.iter().map(|name| self.named(name)).collect()
    }

    /// The shared libraries that a program needs, from these packages where
    /// they have them: the name by which each is looked for, and its file.
    pub fn libraries(&self, program: &Path) -> Result<Vec<(String, PathBuf)>> {
        let mut folders: Vec<_> = self
            .files
            .iter()
            .filter(|path| path.to_string_lossy().contains(".so"))
            .filter_map(|path| path.parent()?.to_str())
            .collect();
        folders.dedup();
        let text = Invocation::new("ldd")
            .args([program])
            .env("LD_LIBRARY_PATH", folders.join(":"))
            .output()?;
        libraries(&text).with_context(|| format!("of {}", program.display()))
    }
}

/// Reads `name => file (address)` and, for the loader, `file (address)`.
fn libraries(text: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        let (name, rest) = line.split_once(" => ").unwrap_or((line, line));
        if rest.starts_with("not found") {
            bail!("the library {name} is missing");
        }
        // Without a file: the kernel's own.
        if let Some((file, _)) = rest.split_once(" (")
            && file.starts_with('/')
        {
            let name = name.split_once(" (").map_or(name, |(name, _)| name);
            found.push((name.to_owned(), PathBuf::from(file)));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ldd_prints_is_read() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x2)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        let found = libraries(text).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|(name, file)| (&**name, file.to_str().unwrap()))
            .collect();
        assert_eq!(
            found,
            [
                ("libc.so.6", "/lib/x/libc.so.6"),
                ("/lib64/ld-linux-x86-64.so.2", "/lib64/ld-linux-x86-64.so.2")
            ]
        );
        let error = libraries("\tliba.so => not found\n").unwrap_err();
        assert!(error.to_string().contains("liba.so is missing"), "{error}");
        assert!(libraries("\tstatically linked\n").unwrap().is_empty());
    }
}
