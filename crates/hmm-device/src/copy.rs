//! Copies between host memory and frames.
//!
//! A large copy would only push other data out of the processor's caches, so
//! it is written around them (non-temporal stores), as the C library does for
//! copies larger than the last-level cache. A small one goes through the
//! caches: a page that comes home is about to be read.

use std::sync::atomic::{AtomicBool, Ordering};

/// Submissions of this many bytes or more are written around the caches.
const STREAM_BYTES: usize = 256 << 10;

/// How large copies are done on this machine.
#[derive(Debug)]
pub struct Copier {
    stream: AtomicBool,
}

impl Copier {
    /// The fastest way of this machine.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        let stream = std::arch::is_x86_feature_detected!("avx");
        #[cfg(not(target_arch = "x86_64"))]
        let stream = false;
        Self {
            stream: AtomicBool::new(stream),
        }
    }

    /// Whether parts of a submission of `total_bytes` are written around the
    /// caches. Then [`Copier::fence`] must follow.
    #[must_use]
    pub fn streams(&self, total_bytes: usize) -> bool {
        total_bytes >= STREAM_BYTES && self.stream.load(Ordering::Relaxed)
    }

    /// Copies whole pages.
    ///
    /// # Safety
    /// Both ranges are mapped, page-aligned, whole pages, and apart; nobody
    /// writes to either or reads the destination meanwhile.
    pub unsafe fn copy(&self, from: *const u8, to: *mut u8, len_bytes: usize, stream: bool) {
        #[cfg(target_arch = "x86_64")]
        if stream {
            // SAFETY: the caller's contract; `streams` has found AVX.
            unsafe { stream_avx(from, to, len_bytes) };
            return;
        }
        let _ = stream;
        // SAFETY: the caller's contract.
        unsafe { std::ptr::copy_nonoverlapping(from, to, len_bytes) };
    }

    /// Makes streamed data visible before everything that follows.
    pub fn fence(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE is part of every x86-64 processor.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

/// Copies pages with non-temporal stores: four pages side by side, so that the
/// memory works on several of its own pages at a time.
///
/// # Safety
/// As [`Copier::copy`]; the processor has AVX.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn stream_avx(from: *const u8, to: *mut u8, len_bytes: usize) {
    use std::arch::x86_64::{
        __m256i, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm256_stream_si256,
    };
    const PAGE: usize = 4096;
    /// Bytes ahead that are asked for.
    const AHEAD: usize = 512;

    #[inline(always)]
    unsafe fn line(from: *const u8, to: *mut u8) {
        // SAFETY: the caller has 64 bytes at both; prefetching never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
            let low = _mm256_loadu_si256(from.cast::<__m256i>());
            let high = _mm256_loadu_si256(from.add(32).cast::<__m256i>());
            _mm256_stream_si256(to.cast::<__m256i>(), low);
            _mm256_stream_si256(to.add(32).cast::<__m256i>(), high);
        }
    }

    let mut done = 0;
    while len_bytes - done >= 4 * PAGE {
        for offset in (0..PAGE).step_by(64) {
            for page in 0..4 {
                let at = done + page * PAGE + offset;
                // SAFETY: `at + 64 <= done + 4 * PAGE <= len_bytes`.
                unsafe { line(from.add(at), to.add(at)) };
            }
        }
        done += 4 * PAGE;
    }
    while done < len_bytes {
        // SAFETY: `len_bytes` is a multiple of the page size, so of 64.
        unsafe { line(from.add(done), to.add(done)) };
        done += 64;
    }
}

/// Copies part of a page from device memory to a place in the caches. With each
/// line of a whole page it asks for one of a page that follows: the processor's
/// prefetcher stops where a page ends, and a kernel that reads whole pages goes
/// on there. (All lines asked for at once, and then a copy by the C library,
/// give 0.4 of this: they are more than the processor can wait for.)
///
/// # Safety
/// Both are mapped for `len_bytes`, and apart.
pub unsafe fn read_ahead(from: *const u8, to: *mut u8, len_bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if len_bytes == 4096 {
        // SAFETY: the caller's contract.
        return unsafe { read_page(from, to) };
    }
    // SAFETY: the caller's contract.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len_bytes) };
}

/// # Safety
/// Both are mapped for a page, and apart.
#[cfg(target_arch = "x86_64")]
unsafe fn read_page(from: *const u8, to: *mut u8) {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_storeu_si128,
    };
    const PAGE: usize = 4096;
    const LINE: usize = 64;
    /// Bytes ahead that are asked for; 1 page is slower, 4 are no faster.
    const AHEAD: usize = 2 * PAGE;
    for line in (0..PAGE).step_by(LINE) {
        // SAFETY: prefetching never faults; SSE is part of every x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line + AHEAD).cast()) };
        for at in (line..line + LINE).step_by(size_of::<__m128i>()) {
            // SAFETY: `at + 16 <= PAGE`, at both.
            unsafe {
                let word = _mm_loadu_si128(from.add(at).cast());
                _mm_storeu_si128(to.add(at).cast(), word);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_copies_every_byte() {
        #[repr(align(4096))]
        struct Pages([u8; 4096 * 3]);
        let mut from = Pages([0; 4096 * 3]);
        for (index, byte) in from.0.iter_mut().enumerate() {
            *byte = u8::try_from(index * 7 % 251).unwrap();
        }
        // Anywhere in the destination, and the last page as well.
        for (offset, page, len) in [(0, 0, 4096), (3, 2, 4096), (8, 1, 4095), (1, 0, 8)] {
            let mut to = vec![0u8; 4096 + 16];
            // SAFETY: whole pages of the one, and room in the other.
            unsafe {
                read_ahead(
                    from.0.as_ptr().add(page * 4096),
                    to.as_mut_ptr().add(offset),
                    len,
                );
            }
            assert!(to[offset..offset + len] == from.0[page * 4096..page * 4096 + len]);
            assert!(to[offset + len..].iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn both_ways_copy_every_byte() {
        #[repr(align(4096))]
        struct Pages([u8; 4096 * 7]);
        let copier = Copier::detect();
        let mut from = Pages([0; 4096 * 7]);
        for (index, byte) in from.0.iter_mut().enumerate() {
            *byte = u8::try_from(index * 7 % 251).unwrap();
        }
        for pages in [1, 4, 5, 7] {
            for stream in [false, copier.streams(usize::MAX)] {
                let mut to = Pages([0; 4096 * 7]);
                // SAFETY: two arrays of seven pages each.
                unsafe { copier.copy(from.0.as_ptr(), to.0.as_mut_ptr(), pages * 4096, stream) };
                copier.fence();
                assert!(to.0[..pages * 4096] == from.0[..pages * 4096]);
                assert!(to.0[pages * 4096..].iter().all(|&byte| byte == 0));
            }
        }
    }
}
