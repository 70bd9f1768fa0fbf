//! Where the C library keeps track of a thread's thread-local data.
//!
//! Code of a shared object (`LD_PRELOAD`, a language's extension module) finds its
//! thread-local data through a table of the thread's, and the C library has that
//! table on the program's heap. An engine thread must not lose it to a device.
//! Executables find theirs without it.

use hmm_types::{PageRange, VirtAddr};

/// Whether the code of this library needs such a table.
pub(crate) fn need_table() -> bool {
    table_address().is_some() && !is_in_executable()
}

/// The calling thread's table.
pub(crate) fn own_table() -> Option<PageRange> {
    /// Entries have two words. The first one, right before what the control block
    /// points to, has the number of those behind it but one.
    const ENTRY: u64 = 16;
    let start = VirtAddr::new(table_address()?.get() - ENTRY);
    let counter = std::ptr::with_exposed_provenance::<u64>(start.addr());
    // SAFETY: this thread's own table, which the C library changes on this thread
    // only.
    let count = unsafe { counter.read() };
    PageRange::covering(start, count.checked_add(2)?.checked_mul(ENTRY)?).ok()
}

/// The thread control block's second word on x86-64, its first on AArch64
/// (glibc: sysdeps/x86_64/nptl/tls.h, sysdeps/aarch64/nptl/tls.h, `tcbhead_t`).
fn table_address() -> Option<VirtAddr> {
    let table: u64;
    #[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
    // SAFETY: reads a word of this thread's own control block.
    unsafe {
        std::arch::asm!("mov {}, fs:[8]", out(reg) table, options(nostack, readonly, preserves_flags));
    }
    #[cfg(all(target_arch = "aarch64", target_env = "gnu"))]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("mrs {0}, tpidr_el0", "ldr {0}, [{0}]", out(reg) table, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(all(
        any(target_arch = "x86_64", target_arch = "aarch64"),
        target_env = "gnu"
    )))]
    {
        table = 0;
    }
    (table != 0).then(|| VirtAddr::new(table))
}

/// Whether this code is the main program's, whose objects come first.
fn is_in_executable() -> bool {
    struct Search {
        code: u64,
        found: bool,
    }
    unsafe extern "C" fn look(
        info: *mut libc::dl_phdr_info,
        _size: libc::size_t,
        search: *mut std::ffi::c_void,
    ) -> std::ffi::c_int {
        // SAFETY: the loader passes a valid structure with a table of its length,
        // and `search` is what was passed below.
        let (info, search) = unsafe { (&*info, &mut *search.cast::<Search>()) };
        if !info.dlpi_phdr.is_null() {
            // SAFETY: as above.
            let segments =
                unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
            search.found = segments.iter().any(|segment| {
                let start = info.dlpi_addr.wrapping_add(segment.p_vaddr);
                segment.p_type == libc::PT_LOAD
                    && (start..start + segment.p_memsz).contains(&search.code)
            });
        }
        1 // only the first one
    }
    let mut search = Search {
        code: is_in_executable as fn() -> bool as usize as u64,
        found: false,
    };
    // SAFETY: the callback gets the pointer to `search`, which outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut search).cast()) };
    search.found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_is_an_executable() {
        assert!(is_in_executable());
        assert!(!need_table());
    }

    #[test]
    fn each_thread_has_its_own_table() {
        let here = table_address();
        let there = std::thread::spawn(table_address).join().unwrap();
        if cfg!(all(target_arch = "x86_64", target_env = "gnu")) {
            assert!(here.is_some() && there.is_some() && here != there);
            assert!(own_table().unwrap().contains(here.unwrap()));
        }
        assert!(own_table().is_none_or(|range| range.pages().get() <= 2));
    }
}
