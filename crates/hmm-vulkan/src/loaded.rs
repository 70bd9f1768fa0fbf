//! What a driver has loaded stays loaded.
//!
//! With the last instance the Vulkan loader unloads the drivers. But a thread that has called
//! one can keep data of the thread's own whose destructor is code of the driver's, and
//! that is run when the thread ends (Mesa's Venus does that): the process would be lost.
//! It is not known which threads have called a driver, so nothing may go that an instance
//! has brought.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_int, c_void};

/// The shared objects that were loaded at some moment, by the names of their files.
pub(crate) struct Objects(BTreeSet<CString>);

impl Objects {
    pub(crate) fn now() -> Self {
        let mut names = BTreeSet::new();
        // SAFETY: the callback gets the pointer to `names`, which lives on, and is called
        // on this thread before the call returns.
        unsafe {
            libc::dl_iterate_phdr(Some(note), (&raw mut names).cast());
        }
        Self(names)
    }

    /// Keeps what has been loaded since for the rest of the process's life.
    pub(crate) fn keep_new(&self) {
        let Self(now) = Self::now();
        for name in now.difference(&self.0) {
            let flags = libc::RTLD_LAZY | libc::RTLD_NOLOAD | libc::RTLD_NODELETE;
            // SAFETY: nothing is loaded that is not there already. One more reference is
            // taken and given back; what it has said of unloading stays.
            unsafe {
                let object = libc::dlopen(name.as_ptr(), flags);
                if !object.is_null() {
                    libc::dlclose(object);
                }
            }
        }
    }
}

unsafe extern "C" fn note(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    names: *mut c_void,
) -> c_int {
    // SAFETY: the C library passes a valid structure, whose name is a text or null, and
    // `names` is what `now` has passed.
    unsafe {
        let name = (*info).dlpi_name;
        if !name.is_null() {
            let names = &mut *names.cast::<BTreeSet<CString>>();
            names.insert(CStr::from_ptr(name).to_owned());
        }
    }
    0
}
