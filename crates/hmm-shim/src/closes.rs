//! The calls that close descriptors: a device whose last descriptor that was
//! gives back its memory.

use std::ffi::{c_int, c_uint};
use std::panic::catch_unwind;

use crate::calls::is_programs;
use crate::errno::Errno;
use crate::{driver, engine, files, real};

/// The device that a descriptor leads to, where closing it matters.
fn closing(fd: c_int) -> Option<files::File> {
    if files::any() && is_programs() && engine::is_own_process() {
        files::find(fd)
    } else {
        None
    }
}

/// A descriptor of a device was closed. With the last one it gives back its
/// memory.
fn closed(file: files::File) {
    let error = Errno::last();
    let _ = catch_unwind(|| {
        if files::is_abandoned(file.inode) && files::remove(file.inode).is_some() {
            driver::release(file);
        }
    });
    error.set();
}

/// Many descriptors were closed.
fn closed_many() {
    if files::any() && is_programs() && engine::is_own_process() {
        let error = Errno::last();
        let _ = catch_unwind(|| files::sweep(driver::release));
        error.set();
    }
}

/// Closes a descriptor, perhaps of a device.
///
/// # Safety
/// As close(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    let file = closing(fd);
    // SAFETY: the caller's contract.
    let result = unsafe { real::close(fd) };
    file.into_iter().for_each(closed);
    result
}

/// Closes descriptors, perhaps of devices.
///
/// # Safety
/// As close_range(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    // SAFETY: the caller's contract.
    let result = unsafe { real::close_range(first, last, flags) };
    closed_many();
    result
}

/// Closes descriptors, perhaps of devices.
///
/// # Safety
/// As closefrom(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: the caller's contract.
    unsafe { real::closefrom(first) };
    closed_many();
}

/// Copies a descriptor over another one, perhaps of a device.
///
/// # Safety
/// As dup2(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup2(from: c_int, to: c_int) -> c_int {
    let file = closing(to);
    // SAFETY: the caller's contract.
    let result = unsafe { real::dup2(from, to) };
    file.into_iter().for_each(closed);
    result
}

/// The same, as dup3(2) does it.
///
/// # Safety
/// As dup3(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int {
    let file = closing(to);
    // SAFETY: the caller's contract.
    let result = unsafe { real::dup3(from, to, flags) };
    file.into_iter().for_each(closed);
    result
}
