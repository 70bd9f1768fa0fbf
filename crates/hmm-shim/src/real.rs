//! The calls of whoever comes next: libc, or another library like this one.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// A function of libc, looked up at its first use.
pub(crate) struct Next {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
}

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            found: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    fn get(&self) -> *mut c_void {
        let found = self.found.load(Ordering::Acquire);
        if !found.is_null() {
            return found;
        }
        // SAFETY: the name is a C string; looking up takes the loader's lock.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        assert!(!found.is_null(), "libc lacks {:?}", self.name);
        self.found.store(found, Ordering::Release);
        found
    }
}

macro_rules! next {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// As the function of libc.
        pub(crate) unsafe fn $name($($argument: $kind),*) -> $result {
            static NEXT: Next = Next::new(
                match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => unreachable!(),
                },
            );
            // SAFETY: the symbol is libc's function of this name, whose
            // parameters these are; optional ones are passed like others on
            // x86-64 and AArch64.
            let next = unsafe {
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($kind),*) -> $result>(
                    NEXT.get(),
                )
            };
            // SAFETY: the caller's contract.
            unsafe { next($($argument),*) }
        }
    )*};
}

next! {
    /// open(2).
    open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int;
    /// open(2) with large files.
    open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int;
    /// openat(2).
    openat(directory: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int;
    /// openat(2) with large files.
    openat64(directory: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int;
    /// open(2), as a compiler that checks its arguments calls it.
    __open_2(path: *const c_char, flags: c_int) -> c_int;
    /// The same with large files.
    __open64_2(path: *const c_char, flags: c_int) -> c_int;
    /// openat(2), as such a compiler calls it.
    __openat_2(directory: c_int, path: *const c_char, flags: c_int) -> c_int;
    /// The same with large files.
    __openat64_2(directory: c_int, path: *const c_char, flags: c_int) -> c_int;
    /// ioctl(2).
    ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int;
    /// mmap(2).
    mmap(address: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    /// mmap(2) with large files.
    mmap64(address: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    /// pread(2).
    pread(fd: c_int, buffer: *mut c_void, len: usize, offset: i64) -> isize;
    /// read(2).
    read(fd: c_int, buffer: *mut c_void, len: usize) -> isize;
    /// pread(2) with large files.
    pread64(fd: c_int, buffer: *mut c_void, len: usize, offset: i64) -> isize;
    /// close(2).
    close(fd: c_int) -> c_int;
    /// close_range(2).
    close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int;
    /// vmsplice(2).
    vmsplice(fd: c_int, parts: *const libc::iovec, count: usize, flags: c_uint) -> isize;
    /// setsockopt(2).
    setsockopt(socket: c_int, level: c_int, option: c_int, value: *const c_void, len: libc::socklen_t) -> c_int;
    /// closefrom(3).
    closefrom(first: c_int) -> ();
    /// dup2(2).
    dup2(from: c_int, to: c_int) -> c_int;
    /// dup3(2).
    dup3(from: c_int, to: c_int, flags: c_int) -> c_int;
    /// stat(2).
    stat(path: *const c_char, status: *mut libc::stat) -> c_int;
    /// stat(2) with large files: the same on 64-bit machines.
    stat64(path: *const c_char, status: *mut libc::stat) -> c_int;
    /// lstat(2).
    lstat(path: *const c_char, status: *mut libc::stat) -> c_int;
    /// lstat(2) with large files.
    lstat64(path: *const c_char, status: *mut libc::stat) -> c_int;
    /// fstat(2).
    fstat(fd: c_int, status: *mut libc::stat) -> c_int;
    /// fstat(2) with large files.
    fstat64(fd: c_int, status: *mut libc::stat) -> c_int;
    /// fstatat(2).
    fstatat(directory: c_int, path: *const c_char, status: *mut libc::stat, flags: c_int) -> c_int;
    /// fstatat(2) with large files.
    fstatat64(directory: c_int, path: *const c_char, status: *mut libc::stat, flags: c_int) -> c_int;
    /// statx(2).
    statx(directory: c_int, path: *const c_char, flags: c_int, mask: c_uint, status: *mut libc::statx) -> c_int;
    /// access(2).
    access(path: *const c_char, mode: c_int) -> c_int;
    /// euidaccess(3).
    euidaccess(path: *const c_char, mode: c_int) -> c_int;
    /// The same by another name.
    eaccess(path: *const c_char, mode: c_int) -> c_int;
    /// faccessat(2).
    faccessat(directory: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int;
}
