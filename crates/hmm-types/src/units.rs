//! Bytes, pages and virtual addresses.

use std::fmt;

/// Bytes in a page. The project runs where the kernel's base page is 4 KiB.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a block, the unit of locking and of residency tables: what one
/// page-middle-directory entry maps on x86-64, and so the size of a THP.
pub const BLOCK_SIZE: u64 = 2 << 20;
/// Pages in a block.
pub const PAGES_PER_BLOCK: usize = 512;
/// The same as the type of indices in a block.
pub const BLOCK_PAGES: u32 = 512;
/// First address that user space cannot have: x86-64 with four-level tables
/// ends user space one page below 2^47.
pub const USER_END: u64 = (1 << 47) - PAGE_SIZE;

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteCount(u64);

impl ByteCount {
    /// `count` bytes.
    #[must_use]
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// `count` KiB. Saturates at `u64::MAX` bytes.
    #[must_use]
    pub const fn kib(count: u64) -> Self {
        Self(count.saturating_mul(1 << 10))
    }

    /// `count` MiB. Saturates at `u64::MAX` bytes.
    #[must_use]
    pub const fn mib(count: u64) -> Self {
        Self(count.saturating_mul(1 << 20))
    }

    /// The plain number of bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// As many whole pages as fit in.
    #[must_use]
    pub const fn whole_pages(self) -> PageCount {
        PageCount(self.0 >> PAGE_SHIFT)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let exponent = ((63 - self.0.leading_zeros()) / 10).min(5);
        let unit = UNITS[exponent as usize - 1];
        let whole = self.0 >> (10 * exponent);
        let rest = self.0 & ((1 << (10 * exponent)) - 1);
        if rest == 0 {
            write!(f, "{whole} {unit}")
        } else {
            let tenth = (u128::from(rest) * 10) >> (10 * exponent);
            write!(f, "{whole}.{tenth} {unit}")
        }
    }
}

impl fmt::Debug for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A number of 4 KiB pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageCount(u64);

impl PageCount {
    /// No pages.
    pub const ZERO: Self = Self(0);
    /// One page.
    pub const ONE: Self = Self(1);

    /// `count` pages.
    #[must_use]
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// The plain number of pages.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number as an index type; lossless on every 64-bit machine.
    #[must_use]
    pub const fn index(self) -> usize {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the project supports 64-bit machines only, where usize is u64"
        )]
        let index = self.0 as usize;
        index
    }

    /// The same size in bytes.
    ///
    /// # Panics
    /// When the size does not fit into 64 bits.
    #[must_use]
    pub const fn bytes(self) -> ByteCount {
        match self.0.checked_mul(PAGE_SIZE) {
            Some(bytes) => ByteCount(bytes),
            None => panic!("page count overflows 64 bits of bytes"),
        }
    }

    /// The same as the length of memory.
    ///
    /// # Panics
    /// As [`PageCount::bytes`].
    #[must_use]
    pub const fn bytes_usize(self) -> usize {
        Self(self.bytes().get()).index()
    }

    /// Sum, saturating: page counts are totals and limits, never addresses.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl From<usize> for PageCount {
    fn from(count: usize) -> Self {
        Self(count as u64)
    }
}

impl std::ops::AddAssign for PageCount {
    fn add_assign(&mut self, other: Self) {
        *self = self.plus(other);
    }
}

impl std::iter::Sum for PageCount {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Self::plus)
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.0)
    }
}

/// A virtual address of the process. Any 64-bit number; whether something is
/// mapped there, or could be, is another question.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VirtAddr(u64);

impl VirtAddr {
    /// The address with this number.
    #[must_use]
    pub const fn new(address: u64) -> Self {
        Self(address)
    }

    /// The address that a pointer holds.
    #[must_use]
    pub fn of<T: ?Sized>(pointer: *const T) -> Self {
        Self(pointer.cast::<u8>().addr() as u64)
    }

    /// The plain number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address as the number type of pointers.
    #[must_use]
    pub const fn addr(self) -> usize {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the project supports 64-bit machines only, where usize is u64"
        )]
        let addr = self.0 as usize;
        addr
    }

    /// The start of the page that the address lies in.
    #[must_use]
    pub const fn page_floor(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// The start of the first page that begins at or after the address.
    #[must_use]
    pub const fn page_ceil(self) -> Option<Self> {
        match self.0.checked_add(PAGE_SIZE - 1) {
            Some(sum) => Some(Self(sum & !(PAGE_SIZE - 1))),
            None => None,
        }
    }

    /// The start of the 2 MiB block that the address lies in.
    #[must_use]
    pub const fn block_floor(self) -> Self {
        Self(self.0 & !(BLOCK_SIZE - 1))
    }

    /// Whether a page begins here.
    #[must_use]
    pub const fn is_page_aligned(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }

    /// Whether a 2 MiB block begins here.
    #[must_use]
    pub const fn is_block_aligned(self) -> bool {
        self.0.is_multiple_of(BLOCK_SIZE)
    }

    /// Number of the page, counted from address 0.
    #[must_use]
    pub const fn page_number(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }

    /// The address `bytes` further up, if there is one.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// The address `pages` further up.
    ///
    /// # Panics
    /// When the sum overflows: the caller already knows a range that holds it.
    #[must_use]
    pub const fn plus_pages(self, pages: u64) -> Self {
        match pages.checked_mul(PAGE_SIZE) {
            Some(bytes) => match self.0.checked_add(bytes) {
                Some(sum) => Self(sum),
                None => panic!("address overflow"),
            },
            None => panic!("address overflow"),
        }
    }

    /// Whole pages from `base` up to the page of this address.
    ///
    /// # Panics
    /// When the address lies below `base`.
    #[must_use]
    pub const fn pages_since(self, base: Self) -> u64 {
        assert!(self.0 >= base.0, "address lies below the base");
        (self.0 - base.0) >> PAGE_SHIFT
    }
}

impl fmt::Display for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_read_like_a_person_writes_them() {
        assert_eq!(ByteCount::new(12).to_string(), "12 B");
        assert_eq!(ByteCount::kib(64).to_string(), "64 KiB");
        assert_eq!(ByteCount::new(1_610_612_736).to_string(), "1.5 GiB");
        assert_eq!(ByteCount::new(u64::MAX).to_string(), "16383.9 PiB");
    }

    #[test]
    fn page_ceil_of_the_last_page_does_not_wrap() {
        assert_eq!(VirtAddr::new(u64::MAX).page_ceil(), None);
        assert_eq!(VirtAddr::new(1).page_ceil(), Some(VirtAddr::new(4096)));
        assert_eq!(VirtAddr::new(4096).page_ceil(), Some(VirtAddr::new(4096)));
    }
}
