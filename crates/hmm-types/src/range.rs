//! Ranges of whole pages.

use std::fmt;

use crate::{BLOCK_SIZE, ByteCount, PAGE_SIZE, PageCount, USER_END, VirtAddr};

/// A non-empty range of whole pages in the user half of the address space.
///
/// ```
/// use hmm_types::{PageRange, VirtAddr};
///
/// // A request names whole pages: 5000 bytes from 0x1800 hold just one.
/// let range = PageRange::inside(VirtAddr::new(0x1800), 8192)?.unwrap();
/// assert_eq!(range.start(), VirtAddr::new(0x2000));
/// assert_eq!(range.pages().get(), 1);
/// # Ok::<(), hmm_types::RangeError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    start: VirtAddr,
    pages: u64,
}

/// Why numbers do not name a range of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The range has no bytes.
    #[error("the range at {start} is empty; name at least one page")]
    Empty {
        /// Where it would begin.
        start: VirtAddr,
    },
    /// The range begins at address 0.
    #[error("the range begins at the null pointer; nothing can be mapped there")]
    Null,
    /// Start or length is no multiple of the page size.
    #[error(
        "the range at {start} of {len_bytes} bytes is not made of whole 4 KiB pages; \
         round it to pages"
    )]
    Unaligned {
        /// Where it begins.
        start: VirtAddr,
        /// Its length.
        len_bytes: u64,
    },
    /// Start plus length exceeds 64 bits.
    #[error("the range at {start} of {len_bytes} bytes runs over the end of the address space")]
    Overflow {
        /// Where it begins.
        start: VirtAddr,
        /// Its length.
        len_bytes: u64,
    },
    /// Part of the range belongs to the kernel.
    #[error(
        "the range at {start} of {len_bytes} bytes reaches beyond user space, which ends at {end}",
        end = VirtAddr::new(USER_END)
    )]
    Kernel {
        /// Where it begins.
        start: VirtAddr,
        /// Its length.
        len_bytes: u64,
    },
}

impl PageRange {
    /// The range that begins at `start` and is `len_bytes` long.
    ///
    /// # Errors
    /// [`RangeError`] when that is empty, not whole pages, or not user space.
    pub fn new(start: VirtAddr, len_bytes: u64) -> Result<Self, RangeError> {
        Self::check(start, len_bytes)?;
        if !start.is_page_aligned() || !len_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Unaligned { start, len_bytes });
        }
        Ok(Self {
            start,
            pages: len_bytes / PAGE_SIZE,
        })
    }

    /// The whole pages inside of `len_bytes` bytes from `start`: `None` when
    /// there is not one. Rounds inwards, so that a page which also holds other
    /// data is never named unasked.
    ///
    /// # Errors
    /// [`RangeError`] when the bytes are none at all, or not user space.
    pub fn inside(start: VirtAddr, len_bytes: u64) -> Result<Option<Self>, RangeError> {
        Self::check(start, len_bytes)?;
        let overflow = RangeError::Overflow { start, len_bytes };
        let end = start.checked_add(len_bytes).ok_or(overflow)?.page_floor();
        let first = start.page_ceil().ok_or(overflow)?;
        Ok((first < end).then(|| Self::span(first, end)))
    }

    /// All pages that hold any of `len_bytes` bytes from `start`.
    ///
    /// # Errors
    /// [`RangeError`] when the bytes are none at all, or not user space.
    pub fn covering(start: VirtAddr, len_bytes: u64) -> Result<Self, RangeError> {
        Self::check(start, len_bytes)?;
        let overflow = RangeError::Overflow { start, len_bytes };
        let end = start
            .checked_add(len_bytes)
            .and_then(VirtAddr::page_ceil)
            .ok_or(overflow)?;
        if start.page_floor().get() == 0 {
            return Err(RangeError::Null);
        }
        Ok(Self::span(start.page_floor(), end))
    }

    /// The page that holds `address`.
    ///
    /// # Errors
    /// [`RangeError`] when the address is null or not in user space.
    pub fn page_of(address: VirtAddr) -> Result<Self, RangeError> {
        Self::covering(address, 1)
    }

    /// `pages` pages from `start`, for callers that already hold a range that
    /// includes them.
    ///
    /// # Panics
    /// When that is no range of pages.
    #[must_use]
    pub fn from_pages(start: VirtAddr, pages: PageCount) -> Self {
        match Self::new(start, pages.bytes().get()) {
            Ok(range) => range,
            Err(error) => panic!("not a range of pages: {error}"),
        }
    }

    /// The pages from `start` up to `end`, which is not included.
    ///
    /// # Panics
    /// When that is no range of pages.
    #[must_use]
    pub fn span(start: VirtAddr, end: VirtAddr) -> Self {
        Self::from_pages(start, PageCount::new(end.pages_since(start)))
    }

    fn check(start: VirtAddr, len_bytes: u64) -> Result<(), RangeError> {
        if start.get() == 0 {
            return Err(RangeError::Null);
        }
        if len_bytes == 0 {
            return Err(RangeError::Empty { start });
        }
        match start.checked_add(len_bytes) {
            None => Err(RangeError::Overflow { start, len_bytes }),
            Some(end) if end.get() > USER_END => Err(RangeError::Kernel { start, len_bytes }),
            Some(_) => Ok(()),
        }
    }

    /// First address.
    #[must_use]
    pub const fn start(self) -> VirtAddr {
        self.start
    }

    /// First address behind the range.
    #[must_use]
    pub const fn end(self) -> VirtAddr {
        self.start.plus_pages(self.pages)
    }

    /// Length in pages; never zero.
    #[must_use]
    pub const fn pages(self) -> PageCount {
        PageCount::new(self.pages)
    }

    /// Length in bytes; never zero.
    #[must_use]
    pub const fn bytes(self) -> ByteCount {
        self.pages().bytes()
    }

    /// Whether the address lies inside.
    #[must_use]
    pub fn contains(self, address: VirtAddr) -> bool {
        self.start <= address && address < self.end()
    }

    /// Whether all of `other` lies inside.
    #[must_use]
    pub fn encloses(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// What both ranges have in common.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::span(start, end))
    }

    /// Whether the two have a page in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.intersection(other).is_some()
    }

    /// `pages` pages from the page with index `first`.
    ///
    /// # Panics
    /// When they do not lie inside.
    #[must_use]
    pub fn slice(self, first: u64, pages: u64) -> Self {
        assert!(
            first
                .checked_add(pages)
                .is_some_and(|end| end <= self.pages),
            "slice reaches out of the range"
        );
        Self::from_pages(self.start.plus_pages(first), PageCount::new(pages))
    }

    /// The addresses of the pages, in order.
    pub fn iter_pages(self) -> impl Iterator<Item = VirtAddr> {
        (0..self.pages).map(move |index| self.start.plus_pages(index))
    }

    /// The range cut at 2 MiB boundaries.
    #[must_use]
    pub const fn blocks(self) -> BlockSpans {
        self.cut_at(PageCount::new(BLOCK_SIZE / PAGE_SIZE))
    }

    /// The range cut at multiples of so many pages.
    #[must_use]
    pub const fn cut_at(self, pages: PageCount) -> BlockSpans {
        BlockSpans {
            rest: Some(self),
            span: pages,
        }
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{} ({})", self.start, self.end(), self.bytes())
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The parts of a range between boundaries; see [`PageRange::blocks`] and
/// [`PageRange::cut_at`].
#[derive(Clone, Debug)]
pub struct BlockSpans {
    rest: Option<PageRange>,
    span: PageCount,
}

impl Iterator for BlockSpans {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let rest = self.rest?;
        let span = self.span.bytes().get();
        let at = rest.start().get();
        let cut = VirtAddr::new(at - at % span + span);
        if cut < rest.end() {
            self.rest = Some(PageRange::span(cut, rest.end()));
            Some(PageRange::span(rest.start(), cut))
        } else {
            self.rest = None;
            Some(rest)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bad_numbers_are_named() {
        let at = VirtAddr::new;
        assert_eq!(PageRange::new(at(0), 4096), Err(RangeError::Null));
        assert!(matches!(
            PageRange::new(at(4096), 0),
            Err(RangeError::Empty { .. })
        ));
        assert!(matches!(
            PageRange::new(at(4097), 4096),
            Err(RangeError::Unaligned { .. })
        ));
        assert!(matches!(
            PageRange::new(at(4096), 5),
            Err(RangeError::Unaligned { .. })
        ));
        assert!(matches!(
            PageRange::new(at(u64::MAX - 4095), 8192),
            Err(RangeError::Overflow { .. })
        ));
        assert!(matches!(
            PageRange::new(at(0xffff_8000_0000_0000), 4096),
            Err(RangeError::Kernel { .. })
        ));
        assert_eq!(PageRange::inside(at(0x1001), 4096), Ok(None));
        // Next to the null pointer lies the page that nothing can be mapped at.
        assert_eq!(PageRange::covering(at(8), 8), Err(RangeError::Null));
        assert_eq!(PageRange::page_of(at(4095)), Err(RangeError::Null));
        assert_eq!(PageRange::inside(at(8), 8), Ok(None));
    }

    proptest! {
        #[test]
        fn blocks_tile_the_range(first in 1u64..4096, pages in 1u64..4096) {
            let range = PageRange::from_pages(VirtAddr::new(first * PAGE_SIZE), PageCount::new(pages));
            let mut next = range.start();
            for span in range.blocks() {
                prop_assert_eq!(span.start(), next);
                prop_assert_eq!(span.start().block_floor(), VirtAddr::new(span.end().get() - 1).block_floor());
                next = span.end();
            }
            prop_assert_eq!(next, range.end());
        }

        #[test]
        fn inside_is_within_covering(start in PAGE_SIZE..1 << 40, len in 1u64..1 << 24) {
            let outer = PageRange::covering(VirtAddr::new(start), len).unwrap();
            prop_assert!(outer.start().get() <= start && start + len <= outer.end().get());
            if let Some(inner) = PageRange::inside(VirtAddr::new(start), len).unwrap() {
                prop_assert!(outer.encloses(inner));
                prop_assert!(inner.start().get() >= start && inner.end().get() <= start + len);
                prop_assert!(outer.pages().get() - inner.pages().get() <= 2);
            } else {
                prop_assert!(outer.pages().get() <= 2);
            }
        }

        #[test]
        fn intersection_is_what_both_contain(a in 1u64..64, n in 1u64..64, b in 1u64..64, m in 1u64..64) {
            let x = PageRange::from_pages(VirtAddr::new(a * PAGE_SIZE), PageCount::new(n));
            let y = PageRange::from_pages(VirtAddr::new(b * PAGE_SIZE), PageCount::new(m));
            for page in 1..200u64 {
                let address = VirtAddr::new(page * PAGE_SIZE);
                let both = x.contains(address) && y.contains(address);
                prop_assert_eq!(x.intersection(y).is_some_and(|i| i.contains(address)), both);
            }
        }
    }
}
