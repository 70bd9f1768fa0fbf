//! Memory of the program's at the device's own addresses.
//!
//! The driver chooses where its memory lies for the device. Where these addresses are free
//! in the process, the program can have memory of its own there, and its pages go to the
//! very frames that have their addresses. Pointers to it then need no translation: kernels
//! run as they were written, and so could any other code on the device.

use std::ptr;

use hmm_types::{FrameId, FrameRange, PAGE_SHIFT, PageCount, PageRange, USER_END, VirtAddr};

use crate::{VulkanDevice, VulkanError};

/// How a pointer of the program becomes one of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddressPolicy {
    /// It is one: the program has memory at the device's own addresses.
    Identity,
    /// A constant is added to it: frames lie as the program's pages do.
    Delta,
    /// A page table is walked in the kernel.
    Table,
}

impl VulkanDevice {
    /// The most direct way that a launch can get at present. One that does not name what
    /// it uses, or whose memory does not lie in the device's as it does in the
    /// program, gets the page table; [`crate::LaunchReport::distance`] says what it was.
    #[must_use]
    pub fn policy(&self) -> AddressPolicy {
        if self.has_identity() {
            AddressPolicy::Identity
        } else if self.window().pages() > 0 {
            AddressPolicy::Delta
        } else {
            AddressPolicy::Table
        }
    }

    /// Whether [`VulkanDevice::map_identical`] would do, as things are now. Nothing stays
    /// mapped.
    ///
    /// # Errors
    /// [`VulkanError::NoIdentity`]: why not.
    pub fn offers_identity(&'static self) -> Result<(), VulkanError> {
        let range = self.identical_range()?;
        let tried = self.driver().run(move || map(range).map(|()| unmap(range)));
        tried
            .ok_or(VulkanError::Lost)?
            .map_err(|error| self.taken(range, &error))
    }

    /// Maps memory of the program's, as large as the device's (in whole blocks of 2 MiB), at
    /// the addresses that the device's has. It is anonymous memory as any other, and the
    /// caller's: it stays when the device is closed.
    ///
    /// Other memory then goes to the device as before; it is just less likely to be
    /// at one distance.
    ///
    /// # Errors
    /// [`VulkanError::NoIdentity`]: the addresses are not free, or none of a program's. So
    /// it is where the driver works in this process (lavapipe), and at the second time.
    pub fn map_identical(&'static self) -> Result<PageRange, VulkanError> {
        let range = self.identical_range()?;
        // A thread of the program takes no lock that faults may wait for; and where the
        // device is closed, nothing is mapped.
        let mapped = self.driver().run(move || {
            map(range)?;
            self.pin_window(range.start().get() >> PAGE_SHIFT);
            Ok::<_, std::io::Error>(())
        });
        mapped
            .ok_or(VulkanError::Lost)?
            .map_err(|error| self.taken(range, &error))?;
        Ok(range)
    }

    /// Where memory would be that has the device's addresses.
    fn identical_range(&self) -> Result<PageRange, VulkanError> {
        let pages = self.window().pages();
        if pages == 0 {
            return Err(self.no_identity("it has less than 2 MiB".to_owned()));
        }
        let first = self.memory().device(FrameRange::new(FrameId::new(0), 1));
        let end = first.checked_add(pages << PAGE_SHIFT);
        if end.is_none_or(|end| end > USER_END) {
            let reason = format!("its memory is at {first:#x}, where no program has any");
            return Err(self.no_identity(reason));
        }
        Ok(PageRange::from_pages(
            VirtAddr::new(first),
            PageCount::new(pages),
        ))
    }

    fn taken(&self, range: PageRange, error: &std::io::Error) -> VulkanError {
        self.no_identity(match error.kind() {
            std::io::ErrorKind::AlreadyExists => format!("{range} is in use in this process"),
            _ => format!("{range} cannot be mapped here: {error}"),
        })
    }

    fn no_identity(&self, reason: String) -> VulkanError {
        VulkanError::NoIdentity {
            device: self.gpu().name().to_owned(),
            reason,
        }
    }

    /// Whether the program was given memory at the device's addresses.
    pub(crate) fn has_identity(&self) -> bool {
        self.window().is_pinned()
    }
}

/// Maps anonymous memory at free addresses.
fn map(range: PageRange) -> std::io::Result<()> {
    let at: *mut libc::c_void = ptr::with_exposed_provenance_mut(range.start().addr());
    let len = range.pages().index() << PAGE_SHIFT;
    let (access, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE,
    );
    // SAFETY: a fresh mapping, which takes the place of none.
    let mapped = unsafe { libc::mmap(at, len, access, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    if mapped != at {
        // Before Linux 4.17 the address was a wish.
        // SAFETY: the mapping just made.
        unsafe { libc::munmap(mapped, len) };
        return Err(std::io::ErrorKind::AlreadyExists.into());
    }
    Ok(())
}

/// The opposite of [`map`], at once.
fn unmap(range: PageRange) {
    let at: *mut libc::c_void = ptr::with_exposed_provenance_mut(range.start().addr());
    // SAFETY: the mapping just made, which nobody knows.
    unsafe { libc::munmap(at, range.pages().bytes_usize()) };
}
