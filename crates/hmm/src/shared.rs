//! Memory that several processes share and a device works on.

use std::path::{Path, PathBuf};

use hmm_os::{Attached, RegionPages, Sharing};
use hmm_types::{ByteCount, PageRange, RangeError};

use crate::host::Host;
use crate::{Error, Memory};

/// Memory of this process that other processes [`attach`], and that migrates for
/// all of them: whichever process touches a page that is on a device waits until it
/// has come home.
///
/// Other shared memory stays where it is, as nobody knows who else maps it. This
/// must therefore be reached through its mappings only, and those must stay where
/// the library has put them: no `mremap`, and no `munmap` but by dropping this.
/// Forked children do not have it; they attach like any other process.
///
/// Should the process end without dropping it, what is on its devices then is lost,
/// and raises SIGBUS in the other processes. Dropping it brings everything home; from
/// then on they share it as they would any other memory.
#[derive(Debug)]
pub struct SharedRegion {
    host: &'static Host,
    window: PageRange,
    path: PathBuf,
}

impl SharedRegion {
    pub(crate) fn open(
        host: &'static Host,
        size: ByteCount,
        pages: RegionPages,
        path: &Path,
    ) -> Result<Self, Error> {
        let refused = |source| Error::Share {
            path: path.to_owned(),
            source,
        };
        if size.get() == 0 {
            return Err(Error::Setting {
                setting: "the size of a shared region",
                value: 0,
                why: "it must have a page at least",
            });
        }
        let too_large = || refused(std::io::ErrorKind::OutOfMemory.into());
        let bytes = size.get();
        let bytes = bytes.checked_next_multiple_of(pages.size().bytes().get());
        let bytes = bytes.ok_or_else(too_large)?;
        let absolute = std::path::absolute(path).map_err(refused)?;
        let sharing = host
            .threads
            .run_on_root(|| Sharing::start(&host.threads, host.space, bytes, pages, &absolute))
            .map_err(refused)?;
        let window = sharing.window();
        host.keep_sharing(sharing);
        Ok(Self {
            host,
            window,
            path: absolute,
        })
    }

    /// Where it begins.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.window.start().addr())
    }

    /// Its size.
    #[must_use]
    pub const fn size(&self) -> ByteCount {
        self.window.bytes()
    }

    /// The pages that it has in this process.
    #[must_use]
    pub const fn range(&self) -> PageRange {
        self.window
    }

    /// Where others attach it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Memory for &SharedRegion {
    fn whole_pages(&self) -> Result<Option<PageRange>, RangeError> {
        Ok(Some(self.window))
    }
}

impl Drop for SharedRegion {
    fn drop(&mut self) {
        if !self.host.is_own_process() {
            return; // a forked child does not have it
        }
        // What cannot come home is served for as long as the process runs.
        if self.host.end_sharing(self.window) {
            hmm_os::unmap(self.window);
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Another process's [`SharedRegion`], mapped into this one. A page that is on the
/// owner's device when it is touched comes home, as in the owner; this process needs
/// no engine for that. If it has one, its devices use the memory in place.
#[derive(Debug)]
pub struct AttachedRegion(Attached);

impl AttachedRegion {
    /// Where it begins in this process.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.0.window().start().addr())
    }

    /// Its size.
    #[must_use]
    pub const fn size(&self) -> ByteCount {
        self.0.window().bytes()
    }

    /// The pages that it has in this process.
    #[must_use]
    pub const fn range(&self) -> PageRange {
        self.0.window()
    }
}

/// Maps another process's [`SharedRegion`], which has been made with this path.
///
/// # Errors
/// [`AttachError`](crate::AttachError); then nothing was changed.
///
/// ```no_run
/// let region = hmm::attach("/run/user/1000/frames")?;
/// println!("{} at {:p}", region.size(), region.as_ptr());
/// # Ok::<(), hmm::AttachError>(())
/// ```
pub fn attach(path: impl AsRef<Path>) -> Result<AttachedRegion, crate::AttachError> {
    hmm_os::attach(path.as_ref()).map(AttachedRegion)
}
