//! Memory that a request can name.

use hmm_types::{PageRange, RangeError, VirtAddr};

/// Memory of the process that a request names.
///
/// Slices are rounded inwards to whole pages. Raw memory is named by a
/// [`PageRange`], which is made of whole pages by construction.
///
/// ```
/// use hmm::{Memory, PAGE_SIZE};
///
/// let numbers = vec![0u64; 4096];
/// let pages = (&numbers[..]).whole_pages()?.expect("32 KiB hold whole pages");
/// assert!(pages.bytes().get() >= 7 * PAGE_SIZE);
/// assert!((&numbers[..3]).whole_pages()?.is_none(), "three numbers are no page");
/// assert!((&numbers[..0]).whole_pages().is_err(), "nothing names no memory");
/// # Ok::<(), hmm::RangeError>(())
/// ```
pub trait Memory {
    /// The whole pages that are named; `None` when there is not one.
    ///
    /// # Errors
    /// [`RangeError`] when no memory of the process is named at all.
    fn whole_pages(&self) -> Result<Option<PageRange>, RangeError>;
}

impl Memory for PageRange {
    fn whole_pages(&self) -> Result<Option<PageRange>, RangeError> {
        Ok(Some(*self))
    }
}

impl<T> Memory for &[T] {
    fn whole_pages(&self) -> Result<Option<PageRange>, RangeError> {
        PageRange::inside(VirtAddr::of(self.as_ptr()), size_of_val(*self) as u64)
    }
}

impl<T> Memory for &mut [T] {
    fn whole_pages(&self) -> Result<Option<PageRange>, RangeError> {
        PageRange::inside(VirtAddr::of(self.as_ptr()), size_of_val(&**self) as u64)
    }
}

impl<T> Memory for *const [T] {
    fn whole_pages(&self) -> Result<Option<PageRange>, RangeError> {
        let bytes = (self.len() as u64).saturating_mul(size_of::<T>() as u64);
        PageRange::inside(VirtAddr::of(self.cast::<T>()), bytes)
    }
}

impl<T> Memory for *mut [T] {
    fn whole_pages(&self) -> Result<Option<PageRange>, RangeError> {
        self.cast_const().whole_pages()
    }
}
