//! The program's memory, as a driver sees it: it may not be there.
//!
//! The kernel copies (process_vm_readv(2) on the process itself), so that a bad
//! pointer is an error and no signal, and pages on a device come home.

use crate::errno::Errno;

const PAGE: usize = 4096;

/// Copies from the program.
pub(crate) fn read(from: u64, into: &mut [u8]) -> Result<(), Errno> {
    let local = piece(into.as_mut_ptr() as usize, into.len());
    // SAFETY: the local piece is the slice; the kernel checks the other.
    unsafe { transfer(libc::process_vm_readv, &local, from, into.len()) }
}

/// Copies to the program.
pub(crate) fn write(to: u64, from: &[u8]) -> Result<(), Errno> {
    let local = piece(from.as_ptr() as usize, from.len());
    // SAFETY: as above; the slice is only read.
    unsafe { transfer(libc::process_vm_writev, &local, to, from.len()) }
}

/// Copies words from the program.
pub(crate) fn read_words(from: u64, into: &mut [u64]) -> Result<(), Errno> {
    let local = piece(into.as_mut_ptr() as usize, size_of_val(into));
    // SAFETY: as in `read`; any bytes are words.
    unsafe { transfer(libc::process_vm_readv, &local, from, size_of_val(into)) }
}

/// Copies words to the program.
pub(crate) fn write_words(to: u64, from: &[u64]) -> Result<(), Errno> {
    let local = piece(from.as_ptr() as usize, size_of_val(from));
    // SAFETY: as in `write`.
    unsafe { transfer(libc::process_vm_writev, &local, to, size_of_val(from)) }
}

/// Whether all of a range can be read now: one byte of each page.
pub(crate) fn probe(from: u64, len: usize) -> Result<(), Errno> {
    let end = from.checked_add(len as u64).ok_or(Errno::FAULT)?;
    let mut at = from;
    while at < end {
        read(at, &mut [0])?;
        at = (at / PAGE as u64 + 1) * PAGE as u64;
    }
    Ok(())
}

type Call = unsafe extern "C" fn(
    libc::pid_t,
    *const libc::iovec,
    libc::c_ulong,
    *const libc::iovec,
    libc::c_ulong,
    libc::c_ulong,
) -> libc::ssize_t;

fn piece(start: usize, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(start),
        iov_len: len,
    }
}

/// # Safety
/// `local` is memory that the call may use so.
unsafe fn transfer(call: Call, local: &libc::iovec, at: u64, len: usize) -> Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    let start = usize::try_from(at).map_err(|_| Errno::FAULT)?;
    let remote = piece(start, len);
    // SAFETY: the caller's contract; the kernel checks the rest.
    let done = unsafe { call(libc::getpid(), local, 1, &raw const remote, 1, 0) };
    if usize::try_from(done) == Ok(len) {
        Ok(())
    } else {
        Err(Errno::FAULT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_pointers_are_errors() {
        let mut word = [0u8; 8];
        assert_eq!(read(0, &mut word), Err(Errno::FAULT));
        assert_eq!(read(u64::MAX - 3, &mut word), Err(Errno::FAULT));
        assert_eq!(write(8, &word), Err(Errno::FAULT));
        assert_eq!(probe(0x1000, 4), Err(Errno::FAULT));
        let there = [7u8; 8];
        read(there.as_ptr() as u64, &mut word).unwrap();
        assert_eq!(word, there);
    }
}
