//! The barest handler of user faults: a thread that sleeps in read(2) of a
//! userfaultfd, copies a page into one that is ready, and moves that in place.
//! It does nothing else: no table, no lock, no choice. Nothing that has to do
//! more can be faster.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use hmm::PageCount;

use super::area::page_bytes;
use super::{Area, abi, cpu};

/// How pages are put in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// UFFDIO_MOVE of a staging page.
    Move,
    /// UFFDIO_COPY: the kernel before 6.8 has no other.
    Copy,
}

/// Memory whose pages come one by one when they are touched, and the thread
/// that brings them.
#[derive(Debug)]
pub struct BareHandler {
    memory: Arc<Area>,
    placement: Placement,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// What the thread works with, all of it made beforehand.
struct Service {
    uffd: OwnedFd,
    memory: Arc<Area>,
    /// Stands in for the memory of a device.
    frames: Area,
    staging: Area,
    placement: Placement,
}

impl BareHandler {
    /// Memory of so many pages, none of which is there, served by a thread
    /// that stays on `cpu`. It ends when each page was touched once.
    pub fn start(pages: PageCount, cpu: usize) -> io::Result<Self> {
        let uffd = open()?;
        let mut api = abi::uffdio_api {
            api: abi::API,
            features: 0,
            ioctls: 0,
        };
        // SAFETY: the structure is the one that the request takes.
        unsafe { abi::request(&uffd, abi::UFFDIO_API, &mut api) }?;
        let placement = if api.features & abi::FEATURE_MOVE != 0 {
            Placement::Move
        } else {
            Placement::Copy
        };
        let service = Service {
            uffd,
            memory: Arc::new(Area::new(pages.bytes(), false)?),
            frames: Area::filled(pages.bytes(), false)?,
            // Filled, so that each page is there when it is needed.
            staging: Area::filled(pages.bytes(), false)?,
            placement,
        };
        let memory = Arc::clone(&service.memory);
        let mut register = abi::uffdio_register {
            range: whole(&memory),
            mode: abi::MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the memory is the handler's own, nobody has seen it yet, and
        // the thread that starts below serves its faults or lets it go.
        unsafe { abi::request(&service.uffd, abi::UFFDIO_REGISTER, &mut register) }?;
        let body = move || {
            // Staying is for speed only.
            let _ = cpu::stay_on(cpu);
            service.run()
        };
        let thread = std::thread::Builder::new()
            .name("bare-handler".to_owned())
            .spawn(body)?;
        Ok(Self {
            memory,
            placement,
            thread: Some(thread),
        })
    }

    /// The memory. Touching a page waits until it has come.
    pub fn memory(&self) -> &Area {
        &self.memory
    }

    /// How pages are put in place.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Waits for the thread, which ends after the last page.
    ///
    /// # Errors
    /// When it could not serve a fault; pages were zeros then.
    pub fn finish(mut self) -> io::Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the bare handler panicked")))
    }
}

impl Service {
    /// Serves one fault for each page; in the end, whatever happened, the
    /// memory is let go, which wakes whoever still waits.
    fn run(self) -> io::Result<()> {
        let result = self.serve();
        let mut range = whole(&self.memory);
        // SAFETY: whoever touches the memory from now on gets zeroed pages.
        unsafe { abi::request(&self.uffd, abi::UFFDIO_UNREGISTER, &mut range) }?;
        result
    }

    fn serve(&self) -> io::Result<()> {
        for number in 0..self.memory.pages().index() {
            let address = self.wait()?;
            let page = address & !(page_bytes() as u64 - 1);
            let staged = self.staging.page(number);
            // SAFETY: both are pages of areas of our own, and different ones;
            // no reference to their words exists.
            unsafe {
                std::ptr::copy_nonoverlapping(self.frames.page(number), staged, page_bytes());
            }
            self.place(page, staged.addr() as u64)?;
        }
        Ok(())
    }

    /// The address of the next fault.
    fn wait(&self) -> io::Result<u64> {
        let mut message = MaybeUninit::<abi::uffd_msg>::zeroed();
        loop {
            // SAFETY: the buffer takes one message, and any bytes are one.
            let bytes = unsafe {
                std::slice::from_raw_parts_mut(
                    message.as_mut_ptr().cast::<u8>(),
                    size_of::<abi::uffd_msg>(),
                )
            };
            match rustix::io::read(&self.uffd, bytes) {
                Ok(len) if len == size_of::<abi::uffd_msg>() => {}
                Ok(_) => return Err(io::Error::other("a message of userfaultfd was cut short")),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
                Err(error) => return Err(error.into()),
            }
            // SAFETY: zeroed, and filled by the kernel: plain numbers.
            let message = unsafe { message.assume_init() };
            if message.event == abi::EVENT_PAGEFAULT {
                // SAFETY: the event says that this member of the union is set.
                return Ok(unsafe { message.arg.pagefault }.address);
            }
        }
    }

    /// Puts the staging page in place, and wakes who waits for it.
    fn place(&self, page: u64, staged: u64) -> io::Result<()> {
        let len = page_bytes() as u64;
        loop {
            let result = match self.placement {
                Placement::Move => {
                    let mut argument = abi::uffdio_move {
                        dst: page,
                        src: staged,
                        len,
                        mode: 0,
                        move_: 0,
                    };
                    // SAFETY: both pages are of areas of our own; the staging
                    // page is not read again.
                    unsafe { abi::request(&self.uffd, abi::UFFDIO_MOVE, &mut argument) }
                }
                Placement::Copy => {
                    let mut argument = abi::uffdio_copy {
                        dst: page,
                        src: staged,
                        len,
                        mode: 0,
                        copy: 0,
                    };
                    // SAFETY: only a hole of the registered memory is filled.
                    unsafe { abi::request(&self.uffd, abi::UFFDIO_COPY, &mut argument) }
                }
            };
            match result {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                other => return other,
            }
        }
    }
}

/// A descriptor whose read(2) waits.
fn open() -> io::Result<OwnedFd> {
    for flags in [libc::O_CLOEXEC, libc::O_CLOEXEC | abi::USER_MODE_ONLY] {
        // SAFETY: a new descriptor observes nothing yet.
        let number = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if let Ok(number) = i32::try_from(number)
            && number >= 0
        {
            // SAFETY: the descriptor is new, so nobody else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
    Err(io::Error::last_os_error())
}

fn whole(area: &Area) -> abi::uffdio_range {
    let range = area.range();
    abi::uffdio_range {
        start: range.start().get(),
        len: range.bytes().get(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_comes() {
        let handler = match BareHandler::start(PageCount::new(8), 0) {
            Ok(handler) => handler,
            Err(error) => {
                eprintln!("skipped: no userfaultfd here ({error})");
                return;
            }
        };
        let wanted = Area::filled(PageCount::new(8).bytes(), false).unwrap();
        for page in 0..8 {
            assert_eq!(handler.memory().touch(page), wanted.touch(page));
        }
        handler.finish().unwrap();
    }
}
