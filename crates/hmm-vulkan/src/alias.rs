//! A second mapping of the program's memory, which stays when the first one goes.
//!
//! Drivers either pin what they import or follow the address that they were given. One
//! that follows refuses the next submission when the program has unmapped that address,
//! and the device is lost, with all that is on it. So it is never given an address of
//! the program's, but one of a mapping of the same pages that nobody else knows.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::ptr;

use hmm_types::{Access, PageRange};

use crate::error::ImportFailure;

const MAPS: &str = "/proc/self/maps";

/// The mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alias {
    pub(crate) base: *mut u8,
    pub(crate) len_bytes: usize,
}

// SAFETY: the mapping belongs to no thread; whoever uses it does so by raw pointers.
unsafe impl Send for Alias {}

/// What a line of /proc/PID/maps says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line<'a> {
    start: u64,
    end: u64,
    shared: bool,
    writable: bool,
    offset: u64,
    device: &'a str,
    inode: &'a str,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let number = |hex| u64::from_str_radix(hex, 16).ok();
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let permissions = words.next()?.as_bytes();
        Some(Self {
            start: number(start)?,
            end: number(end)?,
            shared: permissions.get(3) == Some(&b's'),
            writable: permissions.get(1) == Some(&b'w'),
            offset: number(words.next()?)?,
            device: words.next()?,
            inode: words.next()?,
        })
    }

    /// The one mapping that holds so many bytes from an address on.
    fn holding(maps: &'a str, start: u64, len_bytes: u64) -> Option<Self> {
        let mut lines = maps.lines().filter_map(Self::parse);
        let line = lines.find(|line| line.start <= start && start < line.end)?;
        (start + len_bytes <= line.end).then_some(line)
    }

    /// Which bytes of which file are at an address.
    const fn place(&self, address: u64) -> (u64, &'a str, &'a str) {
        let offset = self.offset + (address - self.start);
        (offset, self.device, self.inode)
    }
}

impl Alias {
    /// Maps shared memory a second time. On the driver's thread, without locks.
    ///
    /// When it returns, what it has mapped has been what the program had at `range`, as
    /// one mapping, at some moment since the call.
    pub(crate) fn of(range: PageRange) -> Result<Self, ImportFailure> {
        let maps = fs::read_to_string(MAPS).map_err(|_| ImportFailure::Gone)?;
        let (start, len) = (range.start().get(), range.bytes().get());
        let line = Line::holding(&maps, start, len).ok_or(ImportFailure::Gone)?;
        if !line.shared {
            return Err(ImportFailure::Private);
        }
        let len_bytes = range.pages().index() << hmm_types::PAGE_SHIFT;
        let base = duplicate(range, len_bytes)
            .or_else(|| map_again(&line, start, len_bytes))
            .ok_or(ImportFailure::Private)?;
        let alias = Self { base, len_bytes };
        // SAFETY: the mapping just made. A child has no use for it; if this fails it has one
        // more mapping of memory that it shares anyway.
        unsafe { libc::madvise(base.cast(), len_bytes, libc::MADV_DONTFORK) };
        if alias.shows(range) {
            return Ok(alias);
        }
        // SAFETY: nobody has seen it.
        unsafe { alias.unmap() };
        Err(ImportFailure::Gone)
    }

    /// Whether the program has the same bytes of the same file at `range`. Both ways to
    /// make an alias look at the program's mapping before: it may have been exchanged, and
    /// a duplicate goes on where a mapping that has become shorter ends.
    fn shows(&self, range: PageRange) -> bool {
        let Ok(maps) = fs::read_to_string(MAPS) else {
            return false;
        };
        let (theirs, ours) = (range.start().get(), self.base.addr() as u64);
        let len = range.bytes().get();
        let place = |start| {
            let line = Line::holding(&maps, start, len)?;
            line.shared.then(|| line.place(start))
        };
        let theirs = place(theirs);
        theirs.is_some() && theirs == place(ours)
    }

    /// Has the kernel make all pages present. What lies behind the end of a file, or
    /// cannot be written for want of space, is an error here and not of the device.
    pub(crate) fn populate(&self, access: Access) -> Result<(), ImportFailure> {
        let advice = match access {
            Access::Read => libc::MADV_POPULATE_READ,
            Access::Write => libc::MADV_POPULATE_WRITE,
        };
        // SAFETY: populating a mapping of this value's own changes no contents.
        let done = unsafe { libc::madvise(self.base.cast(), self.len_bytes, advice) };
        if done == 0 {
            Ok(())
        } else {
            Err(ImportFailure::Gone)
        }
    }

    /// Gives it back.
    ///
    /// # Safety
    /// Nobody uses it from now on, and nobody calls this again.
    pub(crate) unsafe fn unmap(&self) {
        // SAFETY: this value's own mapping, given up by the caller.
        unsafe { libc::munmap(self.base.cast(), self.len_bytes) };
    }
}

/// The kernel's own way, for all shared mappings but those of huge pages.
fn duplicate(range: PageRange, len_bytes: usize) -> Option<*mut u8> {
    let old: *mut libc::c_void = ptr::with_exposed_provenance_mut(range.start().addr());
    // SAFETY: an old length of 0 leaves the old mapping as it is and maps its pages a
    // second time, where nothing is mapped; the kernel refuses that for private ones.
    let new = unsafe { libc::mremap(old, 0, len_bytes, libc::MREMAP_MAYMOVE) };
    exposed(new)
}

/// By the file behind it, for those who may (`CAP_CHECKPOINT_RESTORE`).
fn map_again(line: &Line<'_>, start: u64, len_bytes: usize) -> Option<*mut u8> {
    let path = format!("/proc/self/map_files/{:x}-{:x}", line.start, line.end);
    let file = File::options()
        .read(true)
        .write(line.writable)
        .open(path)
        .ok()?;
    let access = libc::PROT_READ | if line.writable { libc::PROT_WRITE } else { 0 };
    let offset = line.offset + (start - line.start);
    // SAFETY: a fresh mapping where nothing is mapped.
    let new = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len_bytes,
            access,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            libc::off_t::try_from(offset).ok()?,
        )
    };
    exposed(new)
}

fn exposed(mapped: *mut libc::c_void) -> Option<*mut u8> {
    if mapped == libc::MAP_FAILED {
        return None;
    }
    mapped.expose_provenance();
    Some(mapped.cast())
}

#[cfg(test)]
mod tests {
    use hmm_types::{PageCount, VirtAddr};

    use super::*;

    const PAGE: usize = 4096;

    fn map(pages: usize, flags: i32) -> (*mut u8, PageRange) {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = flags | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping.
        let base = unsafe { libc::mmap(ptr::null_mut(), pages * PAGE, access, flags, -1, 0) };
        let base = exposed(base).expect("memory for a test");
        let range = PageRange::from_pages(VirtAddr::of(base), PageCount::from(pages));
        (base, range)
    }

    #[test]
    fn an_alias_shows_the_same_pages_and_stays() {
        let (base, range) = map(8, libc::MAP_SHARED);
        let part = range.slice(2, 3);
        let alias = Alias::of(part).unwrap();
        alias.populate(Access::Write).unwrap();
        // SAFETY: both are mapped, until they are unmapped here.
        unsafe {
            base.add(2 * PAGE).write_volatile(7);
            assert_eq!(alias.base.read_volatile(), 7);
            alias.base.add(PAGE).write_volatile(8);
            assert_eq!(base.add(3 * PAGE).read_volatile(), 8);
            libc::munmap(base.cast(), 8 * PAGE);
            assert_eq!(alias.base.add(PAGE).read_volatile(), 8);
            alias.unmap();
        }
    }

    #[test]
    fn what_is_private_or_not_there_has_none() {
        let (base, range) = map(4, libc::MAP_PRIVATE);
        assert_eq!(Alias::of(range).unwrap_err(), ImportFailure::Private);
        // SAFETY: the test's own.
        unsafe { libc::munmap(base.cast(), 4 * PAGE) };
        let (base, range) = map(4, libc::MAP_SHARED);
        // SAFETY: the second half of the test's own.
        unsafe { libc::munmap(base.add(2 * PAGE).cast(), 2 * PAGE) };
        // Another mapping may follow at once: then it is another one.
        assert!(Alias::of(range).is_err());
        assert!(Alias::of(range.slice(0, 2)).is_ok());
    }

    #[test]
    fn an_alias_of_something_else_is_noticed() {
        let (base, range) = map(4, libc::MAP_SHARED);
        let alias = Alias::of(range).unwrap();
        assert!(alias.shows(range));
        assert!(!alias.shows(range.slice(1, 2)));
        // SAFETY: the test's own mapping is replaced.
        let other = unsafe {
            libc::mmap(
                base.cast(),
                4 * PAGE,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        assert_eq!(other, base.cast());
        assert!(!alias.shows(range));
    }
}
