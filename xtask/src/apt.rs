//! Debian's package manager, with folders of its own: the system's lists and
//! packages stay as they are, and nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::process::Invocation;

/// What suites are signed with; newer systems trust it only where it is named.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One set of folders, with sources of packages.
#[derive(Debug)]
pub struct Apt {
    configuration: PathBuf,
    /// What the last look at the mirror complained about.
    complaint: String,
}

/// A package that can be had.
#[derive(Debug, PartialEq, Eq)]
pub struct Package {
    pub name: String,
    pub version: String,
    /// The file that a download makes.
    pub file: String,
}

impl Apt {
    /// The system's own sources of packages.
    pub fn of_system(directory: &Path) -> Result<Self> {
        Self::open(&directory.join("system"), None)
    }

    /// One suite, from the mirror that the system uses.
    pub fn of_suite(directory: &Path, suite: &str) -> Result<Self> {
        if suite.contains(|letter: char| !letter.is_ascii_alphanumeric() && letter != '-') {
            bail!("`{suite}` is not the name of a suite");
        }
        let mirror = Self::of_system(directory)?.mirror()?;
        let signed = if Path::new(KEYRING).exists() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        let source = format!("deb {signed}{mirror} {suite} main\n");
        Self::open(&directory.join(suite), Some(source))
    }

    /// Looks at the mirror too. Where that fails, older lists may do.
    fn open(directory: &Path, source: Option<String>) -> Result<Self> {
        let state = directory.join("state");
        let cache = directory.join("cache");
        fs::create_dir_all(state.join("lists/partial"))?;
        fs::create_dir_all(cache.join("archives/partial"))?;
        // The hooks would clean the system's caches.
        let mut lines = format!(
            "#clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\n\
             Acquire::Languages \"none\";\n\
             Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
             APT::Sandbox::User \"root\";\n\
             Dir::State \"{}\";\n\
             Dir::State::status \"/dev/null\";\n\
             Dir::Cache \"{}\";\n",
            state.display(),
            cache.display(),
        );
        if let Some(source) = source {
            let list = directory.join("sources.list");
            fs::write(&list, source)?;
            lines += &format!(
                "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"/dev/null\";\n",
                list.display()
            );
        }
        let configuration = directory.join("apt.conf");
        fs::write(&configuration, lines)?;
        let mut apt = Self {
            configuration,
            complaint: String::new(),
        };
        let update = apt.call("apt-get").args(["-qq", "update"]).into_command();
        let said = { update }.output().context("there is no apt-get here")?;
        let said = String::from_utf8_lossy(&said.stderr);
        apt.complaint = said.lines().next().unwrap_or_default().to_owned();
        Ok(apt)
    }

    fn call(&self, program: &str) -> Invocation {
        Invocation::new(program)
            .args([Path::new("-c"), &self.configuration])
            .env("LC_ALL", "C")
    }

    fn missing(&self, what: &str) -> String {
        match &self.complaint[..] {
            "" => format!("apt knows no {what}"),
            complaint => format!("apt knows no {what} ({complaint})"),
        }
    }

    /// Where the system has Debian from.
    fn mirror(&self) -> Result<String> {
        self.call("apt-get")
            .args(["indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)"])
            .output()?
            .lines()
            .find_map(|line| line.strip_prefix("Debian Debian "))
            .map(str::to_owned)
            .with_context(|| self.missing("mirror of Debian"))
    }

    /// The names of the packages that a package depends on.
    pub fn dependencies(&self, name: &str) -> Result<Vec<String>> {
        self.call("apt-cache")
            .args(["depends", "--important", name])
            .output()
            .map(|text| dependencies(&text))
            .with_context(|| self.missing(&format!("package {name}")))
    }

    /// What a download of a package would get.
    pub fn package(&self, name: &str) -> Result<Package> {
        let uri = self
            .call("apt-get")
            .args(["download", "--print-uris", name])
            .output()
            .with_context(|| self.missing(&format!("package {name}")))?;
        package(&uri).with_context(|| self.missing(&format!("file of {name}")))
    }

    /// Puts the package's file into a directory.
    pub fn download(&self, package: &Package, into: &Path) -> Result<()> {
        self.call("apt-get")
            .args(["-qq", "download", &package.name])
            .directory(into)
            .output()
            .with_context(|| format!("cannot download {}", package.file))?;
        Ok(())
    }
}

/// The dependencies in what `apt-cache depends` prints.
fn dependencies(text: &str) -> Vec<String> {
    text.lines()
        .map(str::trim_start)
        .filter_map(|line| {
            line.strip_prefix("Depends: ")
                .or_else(|| line.strip_prefix("PreDepends: "))
        })
        .map(str::to_owned)
        .collect()
}

/// From `'URI' NAME_VERSION_ARCHITECTURE.deb SIZE HASH`.
fn package(uri: &str) -> Option<Package> {
    let file = uri.lines().last()?.split_whitespace().nth(1)?;
    let mut parts = file.split('_');
    Some(Package {
        name: parts.next()?.to_owned(),
        version: parts.next()?.to_owned(),
        file: file.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_prints_is_read() {
        let text = "a\n  PreDepends: b\n  Depends: c\n    d\n";
        assert_eq!(dependencies(text), ["b", "c"]);
        assert!(dependencies("a\n").is_empty());
        let uri = "'http://mirror/pool/a_1%7erc2_all.deb' a_1~rc2_all.deb 166 SHA256:ae95\n";
        let expected = Package {
            name: "a".into(),
            version: "1~rc2".into(),
            file: "a_1~rc2_all.deb".into(),
        };
        assert_eq!(package(uri), Some(expected));
        assert_eq!(package(""), None);
    }

    #[test]
    fn a_suite_is_one_word() {
        let error = Apt::of_suite(Path::new("/nowhere"), "sid main\ndeb").unwrap_err();
        assert!(error.to_string().contains("not the name"), "{error}");
    }
}
