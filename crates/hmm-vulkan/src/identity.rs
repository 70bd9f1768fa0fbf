//! Memory of the program's at the device's own addresses.
//!
//! The driver chooses where its memory lies for the device. Where these addresses are free
//! in the process, the program can have memory of its own there, and its pages go to the
//! very frames that have their addresses. Pointers to it then need no translation: kernels
//! run as they were written, and so could any other code on the device.

use std::ptr;
use std::sync::atomic::Ordering;

use hmm_types::{FrameId, FrameRange, PAGE_SHIFT, PageCount, PageRange, USER_END, VirtAddr};

use crate::{VulkanDevice, VulkanError};

impl VulkanDevice {
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
        let refused = |reason: String| VulkanError::NoIdentity {
            device: self.gpu().name().to_owned(),
            reason,
        };
        let pages = self.window();
        if pages == 0 {
            return Err(refused("it has less than 2 MiB".to_owned()));
        }
        let first = self.memory().device(FrameRange::new(FrameId::new(0), 1));
        let end = first.checked_add(pages << PAGE_SHIFT);
        if end.is_none_or(|end| end > USER_END) {
            let reason = format!("its memory is at {first:#x}, where no program has any");
            return Err(refused(reason));
        }
        let range = PageRange::from_pages(VirtAddr::new(first), PageCount::new(pages));
        // A thread of the program takes no lock that faults may wait for; and where the
        // device is closed, nothing is mapped.
        let mapped = self.driver().run(move || {
            map(range)?;
            self.pin_window(first >> PAGE_SHIFT);
            Ok::<_, std::io::Error>(())
        });
        mapped
            .ok_or(VulkanError::Lost)?
            .map_err(|error| refused(format!("{range} cannot be mapped here: {error}")))?;
        Ok(range)
    }

    /// Whether the program was given memory at the device's addresses.
    pub(crate) fn has_identity(&self) -> bool {
        self.window_is_pinned().load(Ordering::SeqCst)
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
        // SAFETY: the mapping just made. Before Linux 4.17 the address was a wish.
        unsafe { libc::munmap(mapped, len) };
        return Err(std::io::ErrorKind::AddrInUse.into());
    }
    Ok(())
}
