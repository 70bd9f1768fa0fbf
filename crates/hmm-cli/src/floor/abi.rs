//! The kernel's structures and request numbers, checked at compile time.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

pub use linux_raw_sys::general::{
    uffd_msg, uffdio_api, uffdio_copy, uffdio_move, uffdio_range, uffdio_register,
};
use linux_raw_sys::{general, ioctl};

/// Asks for the API.
pub const UFFDIO_API: u32 = ioctl::UFFDIO_API;
/// Registers a range.
pub const UFFDIO_REGISTER: u32 = ioctl::UFFDIO_REGISTER;
/// Lets a range go, and wakes who waits for a page of it.
pub const UFFDIO_UNREGISTER: u32 = ioctl::UFFDIO_UNREGISTER;
/// Places a copy of a page.
pub const UFFDIO_COPY: u32 = ioctl::UFFDIO_COPY;
/// Places a page itself; Linux 6.8.
pub const UFFDIO_MOVE: u32 = 0xC028_AA05;
/// What the handshake asks for.
pub const API: u64 = general::UFFD_API as u64;
/// The feature that says that there is [`UFFDIO_MOVE`].
pub const FEATURE_MOVE: u64 = general::UFFD_FEATURE_MOVE as u64;
/// Faults on pages that are not there.
pub const MODE_MISSING: u64 = general::UFFDIO_REGISTER_MODE_MISSING as u64;
/// Faults of user-mode instructions only: ordinary users get no other.
pub const USER_MODE_ONLY: i32 = general::UFFD_USER_MODE_ONLY as i32;
/// The message that reports a fault.
pub const EVENT_PAGEFAULT: u8 = 0x12;

const _: () = {
    assert!(size_of::<uffd_msg>() == 32);
    assert!(size_of::<uffdio_api>() == 24);
    assert!(size_of::<uffdio_range>() == 16);
    assert!(size_of::<uffdio_register>() == 32);
    assert!(size_of::<uffdio_copy>() == 40);
    assert!(size_of::<uffdio_move>() == 40);
    assert!(UFFDIO_API == 0xC018_AA3F);
    assert!(UFFDIO_REGISTER == 0xC020_AA00);
    assert!(UFFDIO_UNREGISTER == 0x8010_AA01);
    assert!(UFFDIO_COPY == 0xC028_AA03);
    assert!(USER_MODE_ONLY == 1 && general::UFFD_EVENT_PAGEFAULT == 0x12);
};

/// Makes a request.
///
/// # Safety
/// `argument` is of the type that the request takes, the addresses in it
/// belong to the caller, and what the request does to them is allowed.
pub unsafe fn request<T>(fd: &OwnedFd, number: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: passed on to the caller.
    let result = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            number.into(),
            std::ptr::from_mut::<T>(argument),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
