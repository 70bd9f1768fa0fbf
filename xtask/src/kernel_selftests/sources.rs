//! The self-test's sources, out of a Debian package, and what is built of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, Package};
use crate::packages;
use crate::process::Invocation;
use crate::workspace::Workspace;

/// The test, and what its Makefile and its sources include. All kernels from
/// 6.1 on have something for each.
const NEEDED: [&str; 8] = [
    "lib/test_hmm*",
    "mm/gup_test.h",
    "scripts/*.include",
    "tools/arch",
    "tools/include",
    "tools/testing/selftests/*.*",
    // Older kernels call it vm.
    "tools/testing/selftests/[mv]m",
    "tools/testing/selftests/x86",
];
/// The package that depends on a suite's newest kernel sources.
const METAPACKAGE: &str = "linux-source";
const SELFTESTS: &str = "tools/testing/selftests";
const PROGRAM: &str = "hmm-tests";

/// One version of the sources; kept for the next time.
#[derive(Debug)]
pub struct Sources {
    pub version: String,
    directory: PathBuf,
}

impl Sources {
    /// The sources of a suite's newest kernel, of the system's own without one.
    /// Keeps the package too if so told.
    pub fn provide(workspace: &Workspace, suite: Option<&str>, keep: bool) -> Result<Self> {
        packages::GCC.provide()?;
        packages::MAKE.provide()?;
        packages::SETSID.provide()?;
        let place = workspace.target().join("kernel-selftests");
        let lists = place.join("apt");
        let apt = match suite {
            Some(suite) => Apt::of_suite(&lists, suite)?,
            None => Apt::of_system(&lists)?,
        };
        let package = newest(&apt)?;
        let sources = Self {
            directory: place.join(&package.version),
            version: package.version.clone(),
        };
        if !sources.tree().exists() {
            eprintln!("getting {}", package.file);
            sources.unpack(&apt, &package, keep)?;
        }
        Ok(sources)
    }

    fn tree(&self) -> PathBuf {
        self.directory.join("linux")
    }

    /// Where the output of tests goes.
    pub fn logs(&self) -> PathBuf {
        self.directory.join("logs")
    }

    /// Makes the tree, which is there as a whole or not at all.
    fn unpack(&self, apt: &Apt, package: &Package, keep: bool) -> Result<()> {
        let partial = self.directory.join("partial");
        let _ = fs::remove_dir_all(&partial);
        let tree = partial.join("linux");
        fs::create_dir_all(&tree)?;
        apt.download(package, &partial)?;
        let file = partial.join(&package.file);
        Invocation::new("dpkg-deb")
            .args([Path::new("--extract"), &file, &partial])
            .output()?;
        Invocation::new("tar")
            .args(["--extract", "--strip-components=1"])
            .args(["--wildcards", "--no-wildcards-match-slash"])
            .args([Path::new("--file"), &archive(&partial)?])
            .args([Path::new("--directory"), &tree])
            .args(NEEDED.map(|path| format!("linux-source-*/{path}")))
            .output()?;
        fs::rename(&tree, self.tree())?;
        if keep {
            fs::rename(&file, self.directory.join(&package.file))?;
        }
        fs::remove_dir_all(&partial)?;
        Ok(())
    }

    /// Builds the test as the kernel's own Makefile does.
    pub fn build(&self) -> Result<Binary> {
        let selftests = self.tree().join(SELFTESTS);
        let directory = ["mm", "vm"]
            .map(|name| selftests.join(name))
            .into_iter()
            .find(|directory| directory.join(PROGRAM).with_extension("c").exists())
            .with_context(|| format!("Linux {} has no {PROGRAM}.c", self.version))?;
        let output = self.directory.join("build");
        fs::create_dir_all(&output)?;
        let program = output.join(PROGRAM);
        let mut assignment = "OUTPUT=".to_owned();
        assignment += output.to_str().context("the target directory is no text")?;
        let make = Invocation::new("make")
            .args([Path::new("-C"), &directory, Path::new(&assignment)])
            .args([&program]);
        let line = make.line();
        let status = make
            .into_command()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .with_context(|| format!("cannot run `{line}`"))?;
        if !status.success() {
            bail!("`{line}` failed ({status})");
        }
        let harness = fs::read_to_string(selftests.join("kselftest_harness.h"))?;
        Ok(Binary {
            program,
            selects: harness.contains("getopt("),
        })
    }
}

/// The newest kernel sources.
fn newest(apt: &Apt) -> Result<Package> {
    let sources = apt.dependencies(METAPACKAGE)?;
    let name = sources
        .first()
        .with_context(|| format!("{METAPACKAGE} depends on nothing"))?;
    apt.package(name)
}

/// The built test.
#[derive(Debug)]
pub struct Binary {
    pub program: PathBuf,
    /// Whether its harness lists tests, and runs just one if so told. That of
    /// Linux 6.1 always runs all.
    pub selects: bool,
}

/// The archive of the kernel's sources among the files of the package.
fn archive(package: &Path) -> Result<PathBuf> {
    fs::read_dir(package.join("usr/src"))
        .context("the package has no sources")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.to_string_lossy().contains(".tar."))
        .context("the package has no archive")
}
