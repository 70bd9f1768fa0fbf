//! Open device files.
//!
//! A device file is a memfd; its inode tells which one, whatever number it has
//! and however it came by that. The table has an entry for each open(2).

use std::ffi::{CStr, c_int};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags, RawDir};

use crate::errno::Errno;
use crate::real;

/// Device files that one process has open at a time.
pub(crate) const MAX_FILES: usize = 1024;
/// Devices: two with private memory, two with coherent memory.
pub(crate) const UNITS: usize = 4;
/// The first with coherent memory.
pub(crate) const FIRST_COHERENT: usize = 2;

/// What a descriptor leads to: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Inode(u64, u64);

impl Inode {
    pub(crate) fn of(fd: c_int) -> Option<Self> {
        if fd < 0 {
            return None;
        }
        // By the kernel's own call: libc's would be this library's.
        // SAFETY: the number is looked at once; a wrong one is an error.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        Self::from(rustix::fs::fstat(fd))
    }

    /// The inode that a path names.
    pub(crate) fn at(path: &CStr) -> Option<Self> {
        Self::from(rustix::fs::stat(path))
    }

    fn from(stat: rustix::io::Result<rustix::fs::Stat>) -> Option<Self> {
        stat.ok().map(|stat| Self(stat.st_dev, stat.st_ino))
    }
}

/// An open device file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct File {
    pub(crate) inode: Inode,
    /// Which device.
    pub(crate) unit: usize,
    /// `HMM_DMIRROR_FLAGS`.
    pub(crate) flags: u64,
}

static FILES: Mutex<[Option<File>; MAX_FILES]> = Mutex::new([None; MAX_FILES]);
/// Entries of the table: read without its lock.
static COUNT: AtomicUsize = AtomicUsize::new(0);

type Table = MutexGuard<'static, [Option<File>; MAX_FILES]>;

pub(crate) fn lock() -> Table {
    FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether there is any.
pub(crate) fn any() -> bool {
    COUNT.load(Ordering::Acquire) > 0
}

/// In a forked child: the files are those of the parent's memory. The program
/// may keep the descriptors, but nobody is behind them here.
pub(crate) fn forget_all(table: &mut Table) {
    table.fill(None);
    COUNT.store(0, Ordering::Release);
}

/// The device that a path names.
pub(crate) fn unit_of(path: &CStr) -> Option<usize> {
    let number = path.to_bytes().strip_prefix(b"/dev/hmm_dmirror")?;
    let unit = match number {
        [digit @ b'0'..=b'9'] => usize::from(digit - b'0'),
        _ => return None,
    };
    (unit < UNITS).then_some(unit)
}

/// Makes a device file; its descriptor.
pub(crate) fn open(unit: usize, flags: c_int) -> Result<c_int, Errno> {
    let cloexec = if flags & libc::O_CLOEXEC != 0 {
        libc::MFD_CLOEXEC
    } else {
        0
    };
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"hmm_dmirror".as_ptr(), cloexec) };
    if fd < 0 {
        return Err(Errno::last());
    }
    let entered = Inode::of(fd).is_some_and(|inode| {
        let mut table = lock();
        let free = table.iter_mut().find(|entry| entry.is_none());
        free.is_some_and(|entry| {
            let flags = 0;
            *entry = Some(File { inode, unit, flags });
            COUNT.fetch_add(1, Ordering::Release);
            true
        })
    });
    if entered {
        return Ok(fd);
    }
    // SAFETY: the descriptor was made above and nobody knows it yet.
    unsafe { real::close(fd) };
    Err(Errno(libc::EMFILE))
}

/// The device file that a descriptor leads to.
pub(crate) fn find(fd: c_int) -> Option<File> {
    if !any() {
        return None;
    }
    let inode = Inode::of(fd)?;
    lock()
        .iter()
        .flatten()
        .find(|file| file.inode == inode)
        .copied()
}

/// Changes a file's flags; what they were.
pub(crate) fn set_flags(inode: Inode, flags: u64) -> u64 {
    let mut table = lock();
    let mut files = table.iter_mut().flatten();
    match files.find(|file| file.inode == inode) {
        Some(file) => std::mem::replace(&mut file.flags, flags),
        None => 0,
    }
}

/// Whether the program has no descriptor of a file any more. Looks through all
/// of its descriptors, which only whoever closes one has to.
pub(crate) fn is_abandoned(inode: Inode) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = rustix::fs::open(c"/proc/self/fd", flags, Mode::empty()) else {
        return false;
    };
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(&directory, &mut buffer);
    while let Some(entry) = entries.next() {
        let Ok(entry) = entry else { return false };
        let number = entry.file_name().to_str().ok();
        if let Some(fd) = number.and_then(|number| number.parse().ok())
            && Inode::of(fd) == Some(inode)
        {
            return false;
        }
    }
    true
}

/// Takes a file out of the table.
pub(crate) fn remove(inode: Inode) -> Option<File> {
    let mut table = lock();
    let entry = table
        .iter_mut()
        .find(|entry| entry.is_some_and(|file| file.inode == inode))?;
    COUNT.fetch_sub(1, Ordering::Release);
    entry.take()
}

/// Takes out files that were closed behind this library's back: by a raw system
/// call, or by dup2(2).
pub(crate) fn sweep(mut abandoned: impl FnMut(File)) {
    if !any() {
        return;
    }
    let open: Vec<Inode> = lock().iter().flatten().map(|file| file.inode).collect();
    for inode in open {
        if is_abandoned(inode)
            && let Some(file) = remove(inode)
        {
            abandoned(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_paths_are_devices() {
        assert_eq!(unit_of(c"/dev/hmm_dmirror0"), Some(0));
        assert_eq!(unit_of(c"/dev/hmm_dmirror3"), Some(3));
        assert_eq!(unit_of(c"/dev/hmm_dmirror4"), None);
        assert_eq!(unit_of(c"/dev/hmm_dmirror"), None);
        assert_eq!(unit_of(c"/dev/hmm_dmirror00"), None);
        assert_eq!(unit_of(c"/dev/null"), None);
    }

    #[test]
    fn a_file_is_known_by_whatever_number_it_has() {
        let fd = open(1, 0).unwrap();
        // SAFETY: descriptors of this test's own.
        let copy = unsafe { libc::dup(fd) };
        let file = find(copy).unwrap();
        assert_eq!(file.unit, 1);
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_close, fd) };
        assert!(!is_abandoned(file.inode));
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_close, copy) };
        assert!(is_abandoned(file.inode));
        remove(file.inode).unwrap();
        assert!(find(copy).is_none());
    }
}
