//! Reading the program's memory without the risk of a signal.

use hmm_hal::{Progress, Stop};
use hmm_types::{PageCount, PageRange, VirtAddr};
use rustix::io::Errno;

/// Has the kernel copy pages of this process, so that a page which cannot be
/// read is an error and no signal. The kernel copies what it can and tells how
/// much that was; the bytes before the first page refused are always copied.
pub(crate) fn read(pid: u32, from: PageRange, to: VirtAddr) -> Progress {
    let total = from.pages().get();
    let mut done = 0;
    while done < total {
        let rest = from.slice(done, total - done);
        let piece = |start: VirtAddr| libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(start.addr()),
            iov_len: rest.pages().bytes_usize(),
        };
        let (local, remote) = (piece(to.plus_pages(done)), piece(rest.start()));
        // SAFETY: the caller owns the engine memory at `to`, which is as long
        // as `from`; the kernel checks the rest.
        let result = unsafe {
            libc::process_vm_readv(
                pid.cast_signed(),
                &raw const local,
                1,
                &raw const remote,
                1,
                0,
            )
        };
        match u64::try_from(result).unwrap_or(0) / hmm_types::PAGE_SIZE {
            0 => {
                let stop = match Errno::from_io_error(&std::io::Error::last_os_error()) {
                    _ if result >= 0 => Stop::NotMapped,
                    Some(Errno::FAULT) => Stop::NotMapped,
                    Some(Errno::NOMEM) => Stop::NoMemory,
                    _ => Stop::Incompatible,
                };
                return Progress {
                    done: PageCount::new(done),
                    stop: Some(stop),
                };
            }
            pages => done += pages,
        }
    }
    Progress {
        done: PageCount::new(done),
        stop: None,
    }
}
