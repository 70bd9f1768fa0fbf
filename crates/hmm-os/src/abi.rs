//! The kernel's structures and request numbers, checked at compile time, and
//! the one call that passes them.

use std::os::fd::BorrowedFd;

use linux_raw_sys::general as raw;
use linux_raw_sys::ioctl as numbers;
use rustix::io::Result;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

pub(crate) use linux_raw_sys::general::{
    page_region, pm_scan_arg, procmap_query, uffd_msg, uffdio_api, uffdio_continue, uffdio_copy,
    uffdio_move, uffdio_poison, uffdio_range, uffdio_register, uffdio_writeprotect,
    uffdio_zeropage,
};

pub(crate) const UFFDIO_API: Opcode = numbers::UFFDIO_API;
pub(crate) const UFFDIO_REGISTER: Opcode = numbers::UFFDIO_REGISTER;
pub(crate) const UFFDIO_UNREGISTER: Opcode = numbers::UFFDIO_UNREGISTER;
pub(crate) const UFFDIO_WAKE: Opcode = numbers::UFFDIO_WAKE;
pub(crate) const UFFDIO_COPY: Opcode = numbers::UFFDIO_COPY;
pub(crate) const UFFDIO_ZEROPAGE: Opcode = numbers::UFFDIO_ZEROPAGE;
pub(crate) const UFFDIO_WRITEPROTECT: Opcode = numbers::UFFDIO_WRITEPROTECT;
/// Linux 6.8.
pub(crate) const UFFDIO_MOVE: Opcode = opcode::read_write::<uffdio_move>(0xAA, 0x05);
/// Linux 5.13.
pub(crate) const UFFDIO_CONTINUE: Opcode = opcode::read_write::<uffdio_continue>(0xAA, 0x07);
/// Linux 6.6.
pub(crate) const UFFDIO_POISON: Opcode = opcode::read_write::<uffdio_poison>(0xAA, 0x08);
/// On /dev/userfaultfd, Linux 6.1.
pub(crate) const USERFAULTFD_IOC_NEW: Opcode = opcode::none(0xAA, 0x00);
/// Linux 6.7.
pub(crate) const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);
/// Linux 6.11.
pub(crate) const PROCMAP_QUERY: Opcode = opcode::read_write::<procmap_query>(b'f', 17);

pub(crate) const MOVE_MODE_DONTWAKE: u64 = 1;
/// Place a copy without waking who waits for the page.
pub(crate) const COPY_MODE_DONTWAKE: u64 = 1;
/// Place a zeroed page without waking who waits for it.
pub(crate) const ZEROPAGE_MODE_DONTWAKE: u64 = 1;
pub(crate) const MOVE_MODE_ALLOW_SRC_HOLES: u64 = 2;
pub(crate) const WRITEPROTECT_MODE_WP: u64 = 1;
pub(crate) const WRITEPROTECT_MODE_DONTWAKE: u64 = 2;

const _: () = {
    assert!(size_of::<uffd_msg>() == 32);
    assert!(size_of::<raw::uffd_msg__bindgen_ty_1>() == 24);
    assert!(size_of::<uffdio_api>() == 24);
    assert!(size_of::<uffdio_range>() == 16);
    assert!(size_of::<uffdio_register>() == 32);
    assert!(size_of::<uffdio_copy>() == 40);
    assert!(size_of::<uffdio_zeropage>() == 32);
    assert!(size_of::<uffdio_writeprotect>() == 24);
    assert!(size_of::<uffdio_move>() == 40);
    assert!(size_of::<uffdio_poison>() == 32);
    assert!(size_of::<page_region>() == 24);
    assert!(size_of::<pm_scan_arg>() == 96);
    assert!(size_of::<procmap_query>() == 104);

    assert!(UFFDIO_API == 0xC018_AA3F);
    assert!(UFFDIO_REGISTER == 0xC020_AA00);
    assert!(UFFDIO_UNREGISTER == 0x8010_AA01);
    assert!(UFFDIO_WAKE == 0x8010_AA02);
    assert!(UFFDIO_COPY == 0xC028_AA03);
    assert!(UFFDIO_ZEROPAGE == 0xC020_AA04);
    assert!(UFFDIO_MOVE == 0xC028_AA05);
    assert!(UFFDIO_WRITEPROTECT == 0xC018_AA06);
    assert!(UFFDIO_CONTINUE == 0xC020_AA07);
    assert!(UFFDIO_POISON == 0xC020_AA08);
    assert!(USERFAULTFD_IOC_NEW == 0xAA00);
    assert!(PAGEMAP_SCAN == 0xC060_6610);
    assert!(PROCMAP_QUERY == 0xC068_6611);
};

struct Call<'a, T> {
    opcode: Opcode,
    argument: &'a mut T,
}

// SAFETY: `as_ptr` is the argument that the caller of `ioctl` has vouched for;
// the call's own result passes through unchanged.
unsafe impl<T> Ioctl for Call<'_, T> {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        std::ptr::from_mut::<T>(self.argument).cast()
    }

    unsafe fn output_from_ptr(
        out: IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> Result<Self::Output> {
        Ok(out)
    }
}

/// Makes the request; returns what the kernel returned.
///
/// # Safety
/// `argument` is of the type that this request expects, every address in it
/// that the kernel writes through belongs to the caller, and whatever the
/// request does to memory is allowed to happen.
pub(crate) unsafe fn ioctl<T>(fd: BorrowedFd<'_>, opcode: Opcode, argument: &mut T) -> Result<i32> {
    // SAFETY: passed on to the caller.
    unsafe { rustix::ioctl::ioctl(fd, Call { opcode, argument }) }
}
