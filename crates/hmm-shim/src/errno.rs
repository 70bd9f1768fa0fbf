//! Error numbers, as the driver gives them.

/// An error number of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) libc::c_int);

impl Errno {
    pub(crate) const PERM: Self = Self(libc::EPERM);
    pub(crate) const NOENT: Self = Self(libc::ENOENT);
    pub(crate) const NOMEM: Self = Self(libc::ENOMEM);
    pub(crate) const FAULT: Self = Self(libc::EFAULT);
    pub(crate) const BUSY: Self = Self(libc::EBUSY);
    pub(crate) const NODEV: Self = Self(libc::ENODEV);
    pub(crate) const INVAL: Self = Self(libc::EINVAL);
    pub(crate) const IO: Self = Self(libc::EIO);

    /// Sets the calling thread's `errno`.
    pub(crate) fn set(self) {
        // SAFETY: the location is this thread's own.
        unsafe { *libc::__errno_location() = self.0 };
    }

    /// What the last call of libc left.
    pub(crate) fn last() -> Self {
        // SAFETY: as above.
        Self(unsafe { *libc::__errno_location() })
    }
}
