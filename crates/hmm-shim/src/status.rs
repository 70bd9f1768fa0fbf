//! What stat(2) and access(2) say about a device file: it is there, and it is a
//! character device.

use std::ffi::{CStr, c_char, c_int, c_uint};

use crate::calls::{is_programs, result};
use crate::errno::Errno;
use crate::{files, real};

/// Major number of the devices: one of those for local use.
const MAJOR: u32 = 240;
const MODE: u16 = 0o020_666;
const _: () = assert!(MODE as u32 == libc::S_IFCHR | 0o666);

/// Fills in what stat(2) says about a device's path.
///
/// # Safety
/// `status` can be written.
unsafe fn of_path(unit: usize, status: *mut libc::stat) -> Result<c_int, Errno> {
    // Whatever else there is to say: as of any other device.
    // SAFETY: a C string; the caller's contract.
    if unsafe { real::stat(c"/dev/null".as_ptr(), status) } != 0 {
        return Err(Errno::last());
    }
    // SAFETY: as above; it is filled.
    unsafe {
        (*status).st_ino = libc::ino_t::from(MAJOR) << 8 | unit as libc::ino_t;
        name(unit, status);
    }
    Ok(0)
}

/// Corrects what fstat(2) says about a descriptor, if that is of a device.
///
/// # Safety
/// `status` is filled.
unsafe fn of_descriptor(fd: c_int, status: *mut libc::stat) {
    if let Some(file) = files::find(fd) {
        // SAFETY: the caller's contract.
        unsafe { name(file.unit, status) };
    }
}

fn minor(unit: usize) -> u32 {
    u32::try_from(unit).unwrap_or(u32::MAX)
}

unsafe fn name(unit: usize, status: *mut libc::stat) {
    // SAFETY: the caller's contract.
    unsafe {
        (*status).st_mode = MODE.into();
        (*status).st_size = 0;
        (*status).st_blocks = 0;
        (*status).st_rdev = libc::makedev(MAJOR, minor(unit));
    }
}

/// The same as statx(2) says it.
///
/// # Safety
/// `status` is filled.
unsafe fn name_extended(unit: usize, status: *mut libc::statx) {
    // SAFETY: the caller's contract.
    unsafe {
        (*status).stx_mode = MODE;
        (*status).stx_size = 0;
        (*status).stx_blocks = 0;
        (*status).stx_rdev_major = MAJOR;
        (*status).stx_rdev_minor = minor(unit);
    }
}

/// access(2) on a device's path.
const fn allowed(mode: c_int) -> Result<c_int, Errno> {
    if mode & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 {
        return Err(Errno::INVAL);
    }
    if mode & libc::X_OK != 0 {
        return Err(Errno(libc::EACCES));
    }
    Ok(0)
}

/// The device that a path argument names.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn unit_at(path: *const c_char) -> Option<usize> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's contract.
    files::unit_of(unsafe { CStr::from_ptr(path) })
}

macro_rules! stats {
    ($($name:ident($path:ident, $status:ident; $($argument:ident: $kind:ty),*);)*) => {$(
        /// Says what a device's path is, or goes on to libc.
        ///
        /// # Safety
        /// As the function of libc.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $kind),*) -> c_int {
            // SAFETY: the caller's contract.
            unsafe {
                match unit_at($path) {
                    Some(unit) if is_programs() => result(|| of_path(unit, $status)),
                    _ => real::$name($($argument),*),
                }
            }
        }
    )*};
}

stats! {
    stat(path, status; path: *const c_char, status: *mut libc::stat);
    stat64(path, status; path: *const c_char, status: *mut libc::stat);
    lstat(path, status; path: *const c_char, status: *mut libc::stat);
    lstat64(path, status; path: *const c_char, status: *mut libc::stat);
}

macro_rules! fstats {
    ($($name:ident)*) => {$(
        /// Says what a device's descriptor is, or goes on to libc.
        ///
        /// # Safety
        /// As fstat(2).
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(fd: c_int, status: *mut libc::stat) -> c_int {
            // SAFETY: the caller's contract; it is filled when there was no error.
            unsafe {
                let done = real::$name(fd, status);
                if done == 0 && is_programs() {
                    of_descriptor(fd, status);
                }
                done
            }
        }
    )*};
}

fstats! { fstat fstat64 }

macro_rules! fstatats {
    ($($name:ident)*) => {$(
        /// Says what a device's path or descriptor is, or goes on to libc.
        ///
        /// # Safety
        /// As fstatat(2).
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            directory: c_int,
            path: *const c_char,
            status: *mut libc::stat,
            flags: c_int,
        ) -> c_int {
            // SAFETY: the caller's contract; it is filled when there was no error.
            unsafe {
                match unit_at(path) {
                    Some(unit) if is_programs() => result(|| of_path(unit, status)),
                    _ => {
                        let done = real::$name(directory, path, status, flags);
                        if done == 0 && is_programs() && names_descriptor(path, flags) {
                            of_descriptor(directory, status);
                        }
                        done
                    }
                }
            }
        }
    )*};
}

fstatats! { fstatat fstatat64 }

/// Whether a call is about its descriptor itself.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn names_descriptor(path: *const c_char, flags: c_int) -> bool {
    // SAFETY: the caller's contract.
    flags & libc::AT_EMPTY_PATH != 0 && (path.is_null() || unsafe { *path } == 0)
}

/// Says what a device's path or descriptor is, or goes on to libc.
///
/// # Safety
/// As statx(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn statx(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    status: *mut libc::statx,
) -> c_int {
    // SAFETY: the caller's contract; it is filled when there was no error.
    unsafe {
        let unit = unit_at(path).filter(|_| is_programs());
        let (path, flags) = match unit {
            Some(_) => (c"/dev/null".as_ptr(), flags),
            None => (path, flags),
        };
        let done = real::statx(directory, path, flags, mask, status);
        if done == 0 {
            let opened = || {
                let own = is_programs() && names_descriptor(path, flags);
                own.then(|| files::find(directory)).flatten()
            };
            if let Some(unit) = unit.or_else(|| opened().map(|file| file.unit)) {
                name_extended(unit, status);
            }
        }
        done
    }
}

macro_rules! accesses {
    ($($name:ident($path:ident, $mode:ident; $($argument:ident: $kind:ty),*);)*) => {$(
        /// Says that a device is there, or goes on to libc.
        ///
        /// # Safety
        /// As the function of libc.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $kind),*) -> c_int {
            // SAFETY: the caller's contract.
            unsafe {
                match unit_at($path) {
                    Some(_) if is_programs() => result(|| allowed($mode)),
                    _ => real::$name($($argument),*),
                }
            }
        }
    )*};
}

accesses! {
    access(path, mode; path: *const c_char, mode: c_int);
    euidaccess(path, mode; path: *const c_char, mode: c_int);
    eaccess(path, mode; path: *const c_char, mode: c_int);
    faccessat(path, mode; directory: c_int, path: *const c_char, mode: c_int, flags: c_int);
}
