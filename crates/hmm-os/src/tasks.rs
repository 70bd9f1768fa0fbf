//! The process's threads, as /proc shows them, looked at without the heap.

use std::ffi::CStr;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, RawDir, SeekFrom, open, seek};
use rustix::io::{Errno, Result};

use crate::text::decimal;

/// The list of threads.
#[derive(Debug)]
pub(crate) struct Tasks(OwnedFd);

impl Tasks {
    pub(crate) fn open() -> Result<Self> {
        let flags = OFlags::CLOEXEC | OFlags::RDONLY | OFlags::DIRECTORY;
        Ok(Self(open(c"/proc/self/task", flags, Mode::empty())?))
    }

    /// Calls `visit` with the number of each thread, until it is content. Tells
    /// whether it was.
    pub(crate) fn any(&self, mut visit: impl FnMut(u32) -> Result<bool>) -> Result<bool> {
        seek(&self.0, SeekFrom::Start(0))?;
        let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
        let mut entries = RawDir::new(self.0.as_fd(), &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            if let Some((thread, [])) = decimal(entry.file_name().to_bytes())
                && let Ok(thread) = u32::try_from(thread)
                && visit(thread)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Opens a file about a thread; `None` when there is no such thread.
pub(crate) fn open_file(thread: u32, name: &str) -> Result<Option<OwnedFd>> {
    let mut path = [0u8; 48];
    write!(&mut path[..], "/proc/self/task/{thread}/{name}\0").map_err(|_| Errno::NAMETOOLONG)?;
    let path = CStr::from_bytes_until_nul(&path).map_err(|_| Errno::NAMETOOLONG)?;
    match open(path, OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty()) {
        Ok(file) => Ok(Some(file)),
        Err(Errno::NOENT | Errno::SRCH) => Ok(None),
        Err(error) => Err(error),
    }
}
