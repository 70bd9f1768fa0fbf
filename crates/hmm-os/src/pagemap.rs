//! What the CPU's page table holds.
//!
//! PAGEMAP_SCAN (Linux 6.7) reports runs of like pages, so that a whole block
//! costs one call. Older kernels give one word a page, which does not tell huge
//! pages from small ones.

use std::os::fd::{AsFd, OwnedFd};

use hmm_hal::{CpuPage, Presence};
use hmm_types::{PAGE_SIZE, PageCount, PageRange, VirtAddr};
use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, Result, pread};

use crate::abi;

/// Runs that one PAGEMAP_SCAN reports.
const REGIONS: usize = 64;
/// Pages that one read of the plain page map reports.
const WORDS: usize = 512;

const HUGE: u64 = raw::PAGE_IS_HUGE as u64;
const ZERO: u64 = raw::PAGE_IS_PFNZERO as u64;
const FILE: u64 = raw::PAGE_IS_FILE as u64;
const GUARD: u64 = raw::PAGE_IS_GUARD as u64;
/// Bits 63, 63 and 62, 61, 57, and 56 of a word, in its last byte.
const PRESENT: u8 = 0b1000_0000;
const PRESENT_OR_SWAPPED: u8 = 0b1100_0000;
const FILE_OR_SHARED: u8 = 0b0010_0000;
const PROTECTED: u8 = 0b0000_0010;
const EXCLUSIVE: u8 = 0b0000_0001;

/// An open page map.
#[derive(Debug)]
pub(crate) struct Pagemap {
    fd: OwnedFd,
    scan: bool,
    /// The category of guards, if the kernel has one.
    guard: u64,
}

impl Pagemap {
    /// Opens the process's page map; `allow_scan` false forces the plain one.
    pub(crate) fn open(allow_scan: bool) -> Result<Self> {
        let flags = OFlags::CLOEXEC | OFlags::RDONLY;
        let fd = open(c"/proc/self/pagemap", flags, Mode::empty())?;
        let mut map = Self {
            fd,
            scan: false,
            guard: 0,
        };
        let page = PageRange::span(VirtAddr::new(PAGE_SIZE), VirtAddr::new(2 * PAGE_SIZE));
        map.scan = allow_scan && map.visit_scan(page, &mut |_, _| {}).is_ok();
        if map.scan && map.scan(page, GUARD, &mut |_, _| {}).is_ok() {
            map.guard = GUARD;
        }
        Ok(map)
    }

    /// Whether guards are told from pages.
    pub(crate) const fn tells_guards(&self) -> bool {
        self.guard != 0
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
        let mut visited = range.start();
        self.scan(range, self.guard, &mut |span, categories| {
            if visited < span.start() {
                visit(PageRange::span(visited, span.start()), Presence::Hole);
            }
            let huge = categories & HUGE != 0;
            let found = if categories & self.guard == 0 {
                Presence::Present { huge }
            } else {
                Presence::Guard
            };
            visit(span, found);
            visited = span.end();
        })?;
        if visited < range.end() {
            visit(PageRange::span(visited, range.end()), Presence::Hole);
        }
        Ok(())
    }

    /// Visits the pages that are there, with what a mirror wants to know;
    /// `shared` says what kind of mapping the range lies in.
    pub(crate) fn visit_pages(
        &self,
        range: PageRange,
        shared: bool,
        visit: &mut dyn FnMut(PageRange, CpuPage),
    ) -> Result<()> {
        let mut found = |page, word: &[u8], huge, zero, private| {
            let own = shared || (private && word[7] & EXCLUSIVE != 0);
            visit(
                page,
                CpuPage {
                    huge,
                    gigantic: false,
                    zero,
                    own,
                },
            );
        };
        if self.scan {
            let mut result = Ok(());
            self.scan(range, ZERO | FILE | self.guard, &mut |span, categories| {
                if categories & self.guard != 0 || result.is_err() {
                    return;
                }
                let zero = categories & ZERO != 0;
                let huge = categories & HUGE != 0;
                let private = !zero && categories & FILE == 0;
                result = self.each_word(span, &mut |page, word| {
                    found(page, word, huge, zero, private);
                });
            })?;
            return result;
        }
        // One word does not tell the zero page from another's.
        self.each_word(range, &mut |page, word| {
            if word[7] & PRESENT_OR_SWAPPED != 0 {
                let anonymous = word[7] & FILE_OR_SHARED == 0;
                found(page, word, false, false, anonymous);
            }
        })
    }

    /// Whether there is a page: PAGEMAP_SCAN also visits what is none, but a
    /// protection that was left behind, or one that the kernel is moving.
    pub(crate) fn is_present(&self, page: VirtAddr) -> Result<bool> {
        let mut present = false;
        let page = PageRange::from_pages(page, PageCount::ONE);
        self.each_word(page, &mut |_, word| present = word[7] & PRESENT != 0)?;
        Ok(present)
    }

    /// Whether there is a page, and it is write-protected by userfaultfd.
    pub(crate) fn is_protected(&self, page: VirtAddr) -> Result<bool> {
        let mut protected = false;
        let page = PageRange::from_pages(page, PageCount::ONE);
        let both = PRESENT | PROTECTED;
        self.each_word(page, &mut |_, word| protected = word[7] & both == both)?;
        Ok(protected)
    }

    /// Visits runs that are present or swapped out, with their categories, of
    /// which `also` are asked for.
    fn scan(
        &self,
        range: PageRange,
        also: u64,
        visit: &mut dyn FnMut(PageRange, u64),
    ) -> Result<()> {
        let present = u64::from(raw::PAGE_IS_PRESENT | raw::PAGE_IS_SWAPPED);
        let empty = abi::page_region {
            start: 0,
            end: 0,
            categories: 0,
        };
        let mut regions = [empty; REGIONS];
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
                return_mask: present | HUGE | also,
            };
            // SAFETY: the structure is the one that PAGEMAP_SCAN takes; it
            // writes at most REGIONS entries into the array. No flag asks for
            // a change of the page table.
            let count = unsafe { abi::ioctl(self.fd.as_fd(), abi::PAGEMAP_SCAN, &mut argument) }?;
            let count = usize::try_from(count).unwrap_or(0).min(REGIONS);
            for region in &regions[..count] {
                let start = VirtAddr::new(region.start);
                let end = VirtAddr::new(region.end);
                visit(PageRange::span(start, end), region.categories);
            }
            let walked = VirtAddr::new(argument.walk_end);
            if walked <= at {
                return Err(Errno::IO); // it would never end
            }
            at = walked;
        }
        Ok(())
    }

    fn visit_words(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, Presence),
    ) -> Result<()> {
        let mut run: Option<(VirtAddr, bool)> = None;
        self.each_word(range, &mut |page, word| {
            let at = page.start();
            let present = word[7] & PRESENT_OR_SWAPPED != 0;
            match run {
                Some((_, before)) if before == present => {}
                Some((start, before)) => {
                    visit(PageRange::span(start, at), presence(before));
                    run = Some((at, present));
                }
                None => run = Some((at, present)),
            }
        })?;
        if let Some((start, present)) = run {
            visit(PageRange::span(start, range.end()), presence(present));
        }
        Ok(())
    }

    /// Visits the words of the plain page map.
    fn each_word(&self, range: PageRange, visit: &mut dyn FnMut(PageRange, &[u8])) -> Result<()> {
        let mut bytes = [0; WORDS * 8];
        let mut at = range.start();
        while at < range.end() {
            let left = usize::try_from(range.end().pages_since(at)).unwrap_or(WORDS);
            let wanted = &mut bytes[..left.min(WORDS) * 8];
            let got = pread(&self.fd, wanted, at.page_number() * 8)? / 8;
            if got == 0 {
                return Err(Errno::IO);
            }
            for word in bytes[..got * 8].chunks_exact(8) {
                visit(PageRange::from_pages(at, PageCount::ONE), word);
                at = at.plus_pages(1);
            }
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
