//! What the CPU's page table holds.
//!
//! PAGEMAP_SCAN (Linux 6.7) reports runs of like pages, so that a whole block
//! costs one call. Older kernels give one word a page, which does not tell huge
//! pages from small ones.

use std::os::fd::{AsFd, OwnedFd};

use hmm_hal::Presence;
use hmm_types::{PAGE_SIZE, PageRange, VirtAddr};
use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, Result, pread};

use crate::abi;

/// Runs that one PAGEMAP_SCAN reports.
const REGIONS: usize = 64;
/// Pages that one read of the plain page map reports.
const WORDS: usize = 512;

/// An open page map.
#[derive(Debug)]
pub(crate) struct Pagemap {
    fd: OwnedFd,
    scan: bool,
}

impl Pagemap {
    /// Opens the process's page map; `allow_scan` false forces the plain one.
    pub(crate) fn open(allow_scan: bool) -> Result<Self> {
        let flags = OFlags::CLOEXEC | OFlags::RDONLY;
        let fd = open(c"/proc/self/pagemap", flags, Mode::empty())?;
        let mut map = Self { fd, scan: false };
        let page = PageRange::span(VirtAddr::new(PAGE_SIZE), VirtAddr::new(2 * PAGE_SIZE));
        map.scan = allow_scan && map.visit_scan(page, &mut |_, _| {}).is_ok();
        Ok(map)
    }

    /// Whether PAGEMAP_SCAN is there and used.
    pub(crate) const fn has_scan(&self) -> bool {
        self.scan
    }

    /// Visits runs that together cover the range, in order.
    pub(crate) fn visit(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, Presence),
    ) -> Result<()> {
        if self.scan {
            self.visit_scan(range, visit)
        } else {
            self.visit_words(range, visit)
        }
    }

    fn visit_scan(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, Presence),
    ) -> Result<()> {
        let present = u64::from(raw::PAGE_IS_PRESENT | raw::PAGE_IS_SWAPPED);
        let huge = u64::from(raw::PAGE_IS_HUGE);
        let empty = abi::page_region {
            start: 0,
            end: 0,
            categories: 0,
        };
        let mut regions = [empty; REGIONS];
        let mut visited = range.start();
        let mut at = range.start();
        while at < range.end() {
            let mut argument = abi::pm_scan_arg {
                size: size_of::<abi::pm_scan_arg>() as u64,
                flags: 0,
                start: at.get(),
                end: range.end().get(),
                walk_end: 0,
                vec: regions.as_mut_ptr().expose_provenance() as u64,
                vec_len: REGIONS as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: 0,
                category_anyof_mask: present,
                return_mask: present | huge,
            };
            // SAFETY: the structure is the one that PAGEMAP_SCAN takes; it
            // writes at most REGIONS entries into the array. No flag asks for
            // a change of the page table.
            let count = unsafe { abi::ioctl(self.fd.as_fd(), abi::PAGEMAP_SCAN, &mut argument) }?;
            let count = usize::try_from(count).unwrap_or(0).min(REGIONS);
            for region in &regions[..count] {
                let start = VirtAddr::new(region.start);
                let end = VirtAddr::new(region.end);
                if visited < start {
                    visit(PageRange::span(visited, start), Presence::Hole);
                }
                let huge = region.categories & huge != 0;
                visit(PageRange::span(start, end), Presence::Present { huge });
                visited = end;
            }
            let walked = VirtAddr::new(argument.walk_end);
            if walked <= at {
                return Err(Errno::IO); // it would never end
            }
            at = walked;
        }
        if visited < range.end() {
            visit(PageRange::span(visited, range.end()), Presence::Hole);
        }
        Ok(())
    }

    fn visit_words(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, Presence),
    ) -> Result<()> {
        const PRESENT_OR_SWAPPED: u8 = 0b1100_0000; // bits 63 and 62 of a word
        let mut bytes = [0; WORDS * 8];
        let mut at = range.start();
        let mut run: Option<(VirtAddr, bool)> = None;
        while at < range.end() {
            let left = usize::try_from(range.end().pages_since(at)).unwrap_or(WORDS);
            let wanted = &mut bytes[..left.min(WORDS) * 8];
            let got = pread(&self.fd, wanted, at.page_number() * 8)? / 8;
            if got == 0 {
                return Err(Errno::IO);
            }
            for word in bytes[..got * 8].chunks_exact(8) {
                let present = word[7] & PRESENT_OR_SWAPPED != 0;
                match run {
                    Some((_, before)) if before == present => {}
                    Some((start, before)) => {
                        visit(PageRange::span(start, at), presence(before));
                        run = Some((at, present));
                    }
                    None => run = Some((at, present)),
                }
                at = at.plus_pages(1);
            }
        }
        if let Some((start, present)) = run {
            visit(PageRange::span(start, range.end()), presence(present));
        }
        Ok(())
    }
}

const fn presence(present: bool) -> Presence {
    if present {
        Presence::Present { huge: false }
    } else {
        Presence::Hole
    }
}
