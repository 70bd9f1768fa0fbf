//! A Vulkan driver for tests that need no GPU: Mesa's lavapipe.
//!
//! It lies beside the system, below `target/vulkan`, and is chosen by the loader's
//! environment variables: a driver of the system's own stays what it is. Debian 12's
//! own lavapipe ends long loops silently, so there it comes from the backports.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, Package};
use crate::packages;
use crate::process::Invocation;
use crate::workspace::Workspace;

const DRIVERS: &str = "mesa-vulkan-drivers";
const LIBRARY: &str = "libvulkan_lvp.so";
/// The first Mesa whose lavapipe runs every loop to its end.
const OLDEST: u64 = 23;
/// Libraries can need libraries: how often to look for what is missing.
const ROUNDS: usize = 4;

/// A lavapipe that can be used.
#[derive(Debug)]
pub struct Driver {
    directory: PathBuf,
}

impl Driver {
    /// The one that is here already, from an earlier run.
    pub fn existing(workspace: &Workspace) -> Option<Self> {
        let directory = workspace.target().join("vulkan/lavapipe");
        let driver = Self { directory };
        driver.manifest().exists().then_some(driver)
    }

    /// Brings the loader, the validation layer, the tools and the driver.
    pub fn provide(workspace: &Workspace) -> Result<Self> {
        for package in packages::VULKAN.iter().chain(&packages::SHADERS) {
            package.provide()?;
        }
        if let Some(driver) = Self::existing(workspace) {
            return Ok(driver);
        }
        if !rustix::process::getuid().is_root() {
            bail!(
                "lavapipe is missing (to run Vulkan's tests); `cargo xtask vulkan` as root gets it"
            );
        }
        let place = workspace.target().join("vulkan");
        let (apt, package) = newest(&place.join("apt"))?;
        eprintln!("getting {}", package.file);
        unpack(&apt, &package, &place)
            .with_context(|| format!("cannot make {} usable", package.file))?;
        Self::existing(workspace).context("lavapipe was unpacked and is not there")
    }

    /// What Mesa calls itself here.
    pub fn version(&self) -> String {
        let version = fs::read_to_string(self.directory.join("version"));
        version.unwrap_or_default()
    }

    fn manifest(&self) -> PathBuf {
        self.directory.join("lvp_icd.json")
    }

    /// What the tests are to find in their environment.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        let mut variables = vec![
            ("VK_DRIVER_FILES", self.manifest().into_os_string()),
            // Of the system's layers none that nobody has asked for.
            ("VK_LOADER_LAYERS_DISABLE", "~implicit~".into()),
            ("HMM_VULKAN_VALIDATION", "1".into()),
        ];
        let libraries = self.directory.join("libraries");
        if fs::read_dir(&libraries).is_ok_and(|mut files| files.next().is_some()) {
            let mut path = libraries.into_os_string();
            if let Some(before) = std::env::var_os("LD_LIBRARY_PATH") {
                path.push(":");
                path.push(before);
            }
            variables.push(("LD_LIBRARY_PATH", path));
        }
        variables
    }
}

/// Prints what a shell needs to run the tests by hand.
pub fn run(workspace: &Workspace) -> Result<()> {
    let driver = Driver::provide(workspace)?;
    for (name, value) in driver.environment() {
        println!("export {name}='{}'", value.display());
    }
    Ok(())
}

/// The drivers of the system's own suite, or where those are too old, of its backports.
fn newest(lists: &Path) -> Result<(Apt, Package)> {
    let apt = Apt::of_system(lists)?;
    let package = apt.package(DRIVERS)?;
    if major(&package.version)? >= OLDEST {
        return Ok((apt, package));
    }
    let release = fs::read_to_string("/etc/os-release").context("what system is this?")?;
    let suite = format!("{}-backports", codename(&release)?);
    let apt = Apt::of_suite(lists, &suite)?;
    let newer = apt.package(DRIVERS)?;
    if major(&newer.version)? < OLDEST {
        bail!(
            "lavapipe {} ends long loops silently, and {suite} has none of Mesa {OLDEST} or later",
            newer.version
        );
    }
    Ok((apt, newer))
}

fn major(version: &str) -> Result<u64> {
    // An epoch may come first.
    let version = version.rsplit("%3a").next().unwrap_or(version);
    let number = version.split('.').next().unwrap_or_default();
    number
        .parse()
        .with_context(|| format!("`{version}` is no version of Mesa"))
}

fn codename(release: &str) -> Result<&str> {
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"'))
        .context("the system's release has no code name")
}

/// Makes the driver's directory, which is there as a whole or not at all.
fn unpack(apt: &Apt, package: &Package, place: &Path) -> Result<()> {
    let (partial, last) = (place.join("partial"), place.join("lavapipe"));
    let _ = fs::remove_dir_all(&partial);
    let files = partial.join("files");
    let libraries = partial.join("libraries");
    fs::create_dir_all(&libraries)?;
    extract(apt, package, &partial, &files)?;
    let library = find(&files, LIBRARY)?.with_context(|| format!("it has no {LIBRARY}"))?;
    fs::rename(&library, partial.join(LIBRARY))?;
    complete(apt, &partial, &libraries)?;
    fs::remove_dir_all(&files)?;
    fs::write(partial.join("version"), &package.version)?;
    fs::write(
        partial.join("lvp_icd.json"),
        serde_json::to_string_pretty(&serde_json::json!({
            "file_format_version": "1.0.0",
            "ICD": { "library_path": last.join(LIBRARY), "api_version": "1.3.0" },
        }))?,
    )?;
    let _ = fs::remove_dir_all(&last);
    fs::rename(&partial, &last)?;
    Ok(())
}

/// Gets the libraries that the driver needs and the system has not. They are of the
/// system's own suite where that has them.
fn complete(apt: &Apt, partial: &Path, libraries: &Path) -> Result<()> {
    let mut known = vec![DRIVERS.to_owned()];
    for _ in 0..ROUNDS {
        let missing = missing(&partial.join(LIBRARY), libraries)?;
        if missing.is_empty() {
            return Ok(());
        }
        let system = Apt::of_system(&partial.join("apt"))?;
        let wider: Vec<String> = known.clone();
        for name in wider {
            for needed in apt
                .dependencies(&name)
                .or_else(|_| system.dependencies(&name))?
            {
                if known.contains(&needed) {
                    continue;
                }
                known.push(needed.clone());
                let files = partial.join("files").join(&needed);
                let had = system
                    .package(&needed)
                    .and_then(|package| extract(&system, &package, partial, &files));
                if had.is_err() {
                    extract(apt, &apt.package(&needed)?, partial, &files)?;
                }
                for name in &missing {
                    if let Some(file) = find(&files, name)? {
                        fs::copy(file, libraries.join(name))?;
                    }
                }
            }
        }
        let _ = fs::remove_dir_all(partial.join("apt"));
    }
    let missing = missing(&partial.join(LIBRARY), libraries)?;
    if !missing.is_empty() {
        bail!(
            "it needs {}, which no package that it names has",
            missing.join(", ")
        );
    }
    Ok(())
}

/// The shared objects that the loader would not find.
fn missing(library: &Path, libraries: &Path) -> Result<Vec<String>> {
    let said = Invocation::new("ldd")
        .args([library])
        .env("LD_LIBRARY_PATH", libraries)
        .env("LC_ALL", "C")
        .output()?;
    Ok(not_found(&said))
}

fn not_found(ldd: &str) -> Vec<String> {
    ldd.lines()
        .filter_map(|line| line.trim().strip_suffix(" => not found"))
        .map(str::to_owned)
        .collect()
}

fn extract(apt: &Apt, package: &Package, partial: &Path, files: &Path) -> Result<()> {
    apt.download(package, partial)?;
    fs::create_dir_all(files)?;
    let archive = partial.join(&package.file);
    Invocation::new("dpkg-deb")
        .args([Path::new("--extract"), &archive, files])
        .output()?;
    fs::remove_file(archive)?;
    Ok(())
}

/// A file of this name somewhere below a directory.
fn find(directory: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if let Some(found) = find(&path, name)? {
                return Ok(Some(found));
            }
        } else if entry.file_name() == name && path.exists() {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_code_names_are_read() {
        assert_eq!(major("25.0.7-2~bpo12+1").unwrap(), 25);
        assert_eq!(major("1%3a22.3.6-1").unwrap(), 22);
        assert!(major("sid").is_err());
        assert_eq!(
            codename("ID=debian\nVERSION_CODENAME=bookworm\n").unwrap(),
            "bookworm"
        );
        assert!(codename("ID=debian\n").is_err());
    }

    #[test]
    fn what_ldd_misses_is_read() {
        let said = "\tlinux-vdso.so.1 (0x1)\n\tlibLLVM-15.so.1 => not found\n\
                    \tlibm.so.6 => /lib/libm.so.6 (0x2)\n";
        assert_eq!(not_found(said), ["libLLVM-15.so.1"]);
    }
}
