//! The calls that a device is used with. Whatever is not about a device goes on
//! to libc as it came.

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::errno::Errno;
use crate::{driver, engine, files, pagemap, real};

/// Engine threads have a descriptor table of their own: their numbers mean
/// something else.
pub(crate) fn is_programs() -> bool {
    !hmm::is_engine_thread()
}

/// A result as libc gives it; a panic must not reach the program.
pub(crate) fn result(call: impl FnOnce() -> Result<c_int, Errno>) -> c_int {
    match catch_unwind(AssertUnwindSafe(call)).unwrap_or(Err(Errno::IO)) {
        Ok(value) => value,
        Err(error) => {
            error.set();
            -1
        }
    }
}

/// Opens a device, if the path names one.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn open_device(path: *const c_char, flags: c_int) -> Option<c_int> {
    if path.is_null() || !is_programs() {
        return None;
    }
    // SAFETY: the caller's contract.
    let path = unsafe { CStr::from_ptr(path) };
    pagemap::note_open(path);
    let unit = files::unit_of(path)?;
    Some(result(|| {
        if flags & libc::O_DIRECTORY != 0 {
            return Err(Errno(libc::ENOTDIR));
        }
        if flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL {
            return Err(Errno(libc::EEXIST));
        }
        engine::open(unit)?;
        files::sweep(driver::release);
        files::open(unit, flags)
    }))
}

macro_rules! opens {
    ($($name:ident($path:ident, $flags:ident; $($argument:ident: $kind:ty),*);)*) => {$(
        /// Opens a virtual device, or goes on to libc.
        ///
        /// # Safety
        /// As the function of libc.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $kind),*) -> c_int {
            // SAFETY: the caller's contract.
            unsafe {
                open_device($path, $flags).unwrap_or_else(|| real::$name($($argument),*))
            }
        }
    )*};
}

opens! {
    open(path, flags; path: *const c_char, flags: c_int, mode: libc::mode_t);
    open64(path, flags; path: *const c_char, flags: c_int, mode: libc::mode_t);
    openat(path, flags; directory: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t);
    openat64(path, flags; directory: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t);
    __open_2(path, flags; path: *const c_char, flags: c_int);
    __open64_2(path, flags; path: *const c_char, flags: c_int);
    __openat_2(path, flags; directory: c_int, path: *const c_char, flags: c_int);
    __openat64_2(path, flags; directory: c_int, path: *const c_char, flags: c_int);
}

/// Carries out a device's command, or goes on to libc.
///
/// # Safety
/// As ioctl(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if files::any()
        && is_programs()
        && engine::is_own_process()
        && let Some(file) = files::find(fd)
    {
        return result(|| driver::ioctl(file, request, argument.addr() as u64).map(|()| 0));
    }
    // SAFETY: the caller's contract.
    unsafe { real::ioctl(fd, request, argument) }
}

macro_rules! mmaps {
    ($($name:ident)*) => {$(
        /// Maps a device's pages, or goes on to libc.
        ///
        /// # Safety
        /// As mmap(2).
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            address: *mut c_void,
            len: usize,
            protection: c_int,
            flags: c_int,
            fd: c_int,
            offset: i64,
        ) -> *mut c_void {
            let device = fd >= 0 && files::any() && is_programs() && files::find(fd).is_some();
            // SAFETY: the caller's contract.
            unsafe {
                if device {
                    driver::mmap(address, len, protection, flags)
                } else {
                    real::$name(address, len, protection, flags, fd, offset)
                }
            }
        }
    )*};
}

mmaps! { mmap mmap64 }

macro_rules! preads {
    ($($name:ident)*) => {$(
        /// Goes on to libc, and corrects what a page map says.
        ///
        /// # Safety
        /// As pread(2).
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            fd: c_int,
            buffer: *mut c_void,
            len: usize,
            offset: i64,
        ) -> isize {
            // SAFETY: the caller's contract.
            let read = unsafe { real::$name(fd, buffer, len, offset) };
            if let (Ok(read), Ok(offset)) = (usize::try_from(read), u64::try_from(offset))
                && is_programs()
                && pagemap::is_own(fd)
            {
                let _ = catch_unwind(|| pagemap::mark(buffer.addr() as u64, read, offset));
            }
            read
        }
    )*};
}

preads! { pread pread64 }

/// Goes on to libc, and corrects what a page map says.
///
/// # Safety
/// As read(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, len: usize) -> isize {
    // SAFETY: the caller's contract.
    let read = unsafe { real::read(fd, buffer, len) };
    if let Ok(got) = usize::try_from(read)
        && is_programs()
        && pagemap::is_own(fd)
    {
        // SAFETY: asks where the descriptor stands.
        let end = unsafe { libc::lseek64(fd, 0, libc::SEEK_CUR) };
        if let Some(offset) = u64::try_from(end)
            .ok()
            .and_then(|end| end.checked_sub(got as u64))
        {
            let _ = catch_unwind(|| pagemap::mark(buffer.addr() as u64, got, offset));
        }
    }
    read
}

macro_rules! exits {
    ($($name:ident)*) => {$(
        /// Ends the process, as soon as forked children do not need it any more.
        ///
        /// # Safety
        /// As _exit(2).
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(status: c_int) -> ! {
            if is_programs() {
                let _ = catch_unwind(engine::farewell_now);
            }
            // SAFETY: ends the process; nothing of it is used any more.
            unsafe {
                libc::syscall(libc::SYS_exit_group, status);
                std::hint::unreachable_unchecked()
            }
        }
    )*};
}

exits! { _exit _Exit }
