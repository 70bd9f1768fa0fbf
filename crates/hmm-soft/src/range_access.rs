//! Commands on whole ranges: what a device with a copy engine does.
//!
//! Unlike a kernel's loads and stores these take pages as they are mapped *now*
//! and stop at the first one that is not, so that a command can say how often
//! it had to ask for pages. Memory used in place is copied by the kernel
//! (process_vm_readv(2)): whatever the program does to its mappings meanwhile,
//! the command gets an error and the process no signal.

use std::ptr;

use hmm_hal::Reach;
use hmm_types::{Access, PageCount, PageRange};

use crate::page_table::Entry;
use crate::{Context, KernelError};

const PAGE: usize = PageCount::ONE.bytes_usize();

impl Context {
    /// Has the engine make the pages of a range usable where they are; see
    /// [`hmm_hal::FaultHandler::fault_range`]. Returns how many pages from the
    /// start are, for now.
    ///
    /// # Errors
    /// [`KernelError`], when the range must not be accessed so.
    pub fn fault_range(
        &self,
        range: PageRange,
        access: Access,
        reach: Reach,
    ) -> Result<PageCount, KernelError> {
        let _paused = self.pause();
        Ok(self.device().fault_range(range, access, reach)?)
    }

    /// Loads whole pages up to the first that the device has no mapping for,
    /// at most as many as there is room for. Returns how many that were.
    pub fn read_mapped(&self, range: PageRange, into: &mut [u8]) -> PageCount {
        let most = range.pages().index().min(into.len() / PAGE);
        let to = into.as_mut_ptr();
        let direct = self.never_faults(to, most * PAGE);
        self.each_mapped::<false>(range, most, |page, at| {
            // SAFETY: `page` is below `most`, for which there is room.
            let to = unsafe { to.add(page * PAGE) };
            let stop = if direct { to } else { self.bounce_page() };
            let copied = match at {
                // SAFETY: `in_section` gives a pointer to the whole page.
                At::Device => self.in_section::<false, ()>(range_at(range, page), &|from| unsafe {
                    ptr::copy_nonoverlapping(from.cast_const(), stop, PAGE);
                }),
                At::InPlace(pages) => {
                    return copy_in_place::<false>(range_at(range, page), to, pages);
                }
            };
            if copied.is_some() && !direct {
                // SAFETY: as above; outside of the section, so this may fault.
                unsafe { ptr::copy_nonoverlapping(stop.cast_const(), to, PAGE) };
            }
            usize::from(copied.is_some())
        })
    }

    /// Stores whole pages up to the first that the device has no mapping for
    /// that may be written. Returns how many that were.
    pub fn write_mapped(&self, range: PageRange, from: &[u8]) -> PageCount {
        let most = range.pages().index().min(from.len() / PAGE);
        let from = from.as_ptr();
        let direct = self.never_faults(from, most * PAGE);
        self.each_mapped::<true>(range, most, |page, at| {
            // SAFETY: `page` is below `most`, which the slice is long.
            let from = unsafe { from.add(page * PAGE) };
            match at {
                At::Device => {
                    let stop = if direct {
                        from
                    } else {
                        // SAFETY: the bounce page is a page, and this worker's.
                        unsafe { ptr::copy_nonoverlapping(from, self.bounce_page(), PAGE) };
                        self.bounce_page().cast_const()
                    };
                    // SAFETY: `in_section` gives a pointer to the whole page.
                    let done = self.in_section::<true, ()>(range_at(range, page), &|to| unsafe {
                        ptr::copy_nonoverlapping(stop, to, PAGE);
                    });
                    usize::from(done.is_some())
                }
                At::InPlace(pages) => {
                    copy_in_place::<true>(range_at(range, page), from.cast_mut(), pages)
                }
            }
        })
    }

    /// Goes through mapped pages: `visit` is given the number of a page and
    /// where it is, and says how many pages it has dealt with.
    fn each_mapped<const WRITE: bool>(
        &self,
        range: PageRange,
        most: usize,
        mut visit: impl FnMut(usize, At) -> usize,
    ) -> PageCount {
        let mut page = 0;
        while page < most {
            let at = match self.entry_at(range_at(range, page)) {
                Some(entry) if entry.is_frame_for(WRITE) || entry.is_staged_for(WRITE) => {
                    At::Device
                }
                Some(entry) if entry.is_in_place_for(WRITE) => {
                    let in_place = |&page: &usize| {
                        self.entry_at(range_at(range, page))
                            .is_some_and(|entry| entry.is_in_place_for(WRITE))
                    };
                    At::InPlace((page..most).take_while(in_place).count())
                }
                _ => break,
            };
            match visit(page, at) {
                0 => break,
                pages => page += pages,
            }
        }
        PageCount::from(page)
    }

    /// What the page table holds for an address; the leaf is cached for the
    /// access that follows.
    fn entry_at(&self, address: usize) -> Option<Entry> {
        let found = self.device().table().leaf(address)?;
        self.cache_leaf(address, found);
        // SAFETY: leaves stay until the device is closed, which waits for this
        // worker's end.
        Some(unsafe { (*found.leaf).entry(address) })
    }
}

/// Where the next pages are.
enum At {
    /// A frame or a staging page.
    Device,
    /// So many pages of the process's own memory.
    InPlace(usize),
}

fn range_at(range: PageRange, page: usize) -> usize {
    range.start().addr() + page * PAGE
}

/// Has the kernel copy pages between the program's memory and a buffer; how
/// many it could.
fn copy_in_place<const WRITE: bool>(address: usize, buffer: *mut u8, pages: usize) -> usize {
    let piece = |base: *mut libc::c_void| libc::iovec {
        iov_base: base,
        iov_len: pages * PAGE,
    };
    let local = piece(buffer.cast());
    let remote = piece(ptr::with_exposed_provenance_mut(address));
    let call = if WRITE {
        libc::process_vm_writev
    } else {
        libc::process_vm_readv
    };
    // SAFETY: the caller owns the buffer for that many pages, and the program
    // lets its device access the rest, which the kernel checks.
    let done = unsafe { call(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(done).unwrap_or(0) / PAGE
}
