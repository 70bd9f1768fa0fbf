//! Where things are.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::process::Invocation;

/// The workspace that this program was built from.
#[derive(Debug)]
pub struct Workspace {
    root: PathBuf,
    cargo: OsString,
}

impl Workspace {
    /// The workspace above this crate.
    pub fn find() -> Self {
        let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        Self {
            root: own.parent().map_or(own.clone(), Path::to_path_buf),
            cargo: env::var_os("CARGO").unwrap_or_else(|| "cargo".into()),
        }
    }

    /// A path below the root.
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.root.join(below)
    }

    /// The root itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where cargo puts what it builds.
    pub fn target(&self) -> PathBuf {
        env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| self.path("target"), |given| self.path(given))
    }

    /// A call of cargo in the root.
    pub fn cargo<const N: usize>(&self, arguments: [&str; N]) -> Invocation {
        Invocation::new(&self.cargo)
            .args(arguments)
            .directory(&self.root)
    }
}
