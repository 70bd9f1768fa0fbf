//! A peer's side: a process that uses another one's region.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hmm_types::{PAGE_SIZE, PageRange};
use rustix::fs::{SeekFrom, fstatfs, seek};
use rustix::io::Errno;

use super::owner::{map, unmap};
use super::{RegionPages, wire};
use crate::fatal::fail;
use crate::thread::EngineThread;
use crate::threads::EngineThreads;
use crate::uffd::{
    FEATURE_MINOR_HUGETLB, FEATURE_POISON, FEATURE_WP, FEATURES_HUGETLB, FEATURES_SHARED, Reach,
    Uffd,
};

/// What statfs(2) calls hugetlbfs.
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// Why a region could not be attached; nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Nobody answers there.
    #[error("cannot reach the owner of the shared region: {0}; is it running, at this path?")]
    Connect(io::Error),
    /// The owner turned it away.
    #[error("the owner of the shared region does not take this process in: {0}")]
    Refused(io::Error),
    /// The memory could not be mapped.
    #[error("cannot map the shared region: {0}; see `ulimit -v`")]
    Map(io::Error),
    /// This kernel's userfaultfd cannot watch shared memory.
    #[error("cannot watch the shared region: {0}; shared memory needs Linux 5.19 or later")]
    Watch(io::Error),
    /// No thread.
    #[error("cannot start a thread: {0}; see `ulimit -u`")]
    Thread(#[from] io::Error),
}

/// Another process's shared region, mapped into this one.
#[derive(Debug)]
pub struct Attached {
    window: PageRange,
    threads: EngineThreads,
    stream: Option<UnixStream>,
    watch: Option<EngineThread>,
    /// This process lets go: the end of the connection is not the owner's.
    ending: Arc<AtomicBool>,
}

impl Attached {
    /// Where it is.
    #[must_use]
    pub const fn window(&self) -> PageRange {
        self.window
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        unmap(self.window);
        let stream = self.stream.take();
        self.threads.run_on_root(move || {
            if let Some(stream) = stream {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        if let Some(watch) = self.watch.take() {
            watch.join();
        }
        self.threads.end();
    }
}

/// Maps the region whose owner listens at `path`.
///
/// # Errors
/// [`AttachError`]; then nothing was changed.
pub fn attach(path: &Path) -> Result<Attached, AttachError> {
    let threads = EngineThreads::start()?;
    let ending = Arc::new(AtomicBool::new(false));
    let (window, stream, watch) = threads.run_on_root(|| {
        let (stream, file, bytes) = connect(path)?;
        let window = map(&file, bytes).map_err(AttachError::Map)?;
        let pages = pages_of(&file);
        let joined = join(&stream, window, pages).and_then(|uffd| {
            let (own, file) = (stream.try_clone()?, file);
            let ending = Arc::clone(&ending);
            let body = move || watch(&own, &ending, &uffd, &file, window, pages);
            Ok(threads.spawn("hmm-attached", None, body)?)
        });
        match joined {
            Ok(watch) => Ok((window, stream, watch)),
            Err(error) => {
                unmap(window);
                Err(error)
            }
        }
    })?;
    Ok(Attached {
        window,
        threads,
        stream: Some(stream),
        watch: Some(watch),
        ending,
    })
}

fn connect(path: &Path) -> Result<(UnixStream, OwnedFd, u64), AttachError> {
    let stream = UnixStream::connect(path).map_err(AttachError::Connect)?;
    match wire::receive(&stream, wire::HELLO) {
        Ok((bytes, Some(file))) => Ok((stream, file, bytes)),
        Ok((_, None)) => Err(AttachError::Refused(io::ErrorKind::InvalidData.into())),
        Err(error) => Err(AttachError::Refused(error)),
    }
}

fn pages_of(file: &OwnedFd) -> RegionPages {
    let huge = |kind| u32::try_from(kind) == Ok(HUGETLBFS_MAGIC);
    match fstatfs(file) {
        Ok(found) if huge(found.f_type) => RegionPages::Huge,
        _ => RegionPages::Small,
    }
}

/// Has the owner serve the mapping's faults.
fn join(stream: &UnixStream, window: PageRange, pages: RegionPages) -> Result<Uffd, AttachError> {
    let needed = FEATURE_WP
        | match pages {
            RegionPages::Small => FEATURES_SHARED,
            RegionPages::Huge => FEATURES_HUGETLB | FEATURE_MINOR_HUGETLB,
        };
    let wanted = needed | FEATURE_POISON;
    let refused = |error: Errno| AttachError::Watch(error.into());
    let uffd = Uffd::open(Reach::Full, wanted)
        .or_else(|_| Uffd::open(Reach::UserMode, wanted))
        .map_err(refused)?;
    if uffd.features() & needed != needed {
        return Err(refused(Errno::NOSYS));
    }
    uffd.register(window, true)
        .map_err(|error| AttachError::Watch(io::Error::other(error)))?;
    let start = window.start().get();
    wire::send(stream, wire::HELLO, start, Some(uffd.as_fd()))
        .and_then(|()| wire::receive(stream, wire::READY))
        .map_err(AttachError::Refused)?;
    Ok(uffd)
}

/// Body of the thread that waits for the owner's end.
fn watch(
    stream: &UnixStream,
    ending: &AtomicBool,
    uffd: &Uffd,
    file: &OwnedFd,
    window: PageRange,
    pages: RegionPages,
) {
    match wire::receive(stream, wire::BYE) {
        _ if ending.load(Ordering::Acquire) => {}
        // Everything is home: from now on this is memory like any other.
        Ok(_) => drop(uffd.unregister(window)),
        // What the owner had on its devices went with it, and must not read as
        // zeros.
        Err(_) => match pages {
            RegionPages::Small => poison_holes(uffd, file, window),
            RegionPages::Huge => poison_huge_holes(uffd, window),
        },
    }
}

fn poison_holes(uffd: &Uffd, file: &OwnedFd, window: PageRange) {
    let end = window.bytes().get();
    let page_at = |offset: u64| window.start().plus_pages(offset / PAGE_SIZE);
    let mut at = 0;
    while at < end {
        let data = seek(file, SeekFrom::Data(at)).unwrap_or(end).min(end);
        if at < data {
            let hole = PageRange::span(page_at(at), page_at(data));
            poison(uffd, window, hole, RegionPages::Small);
        }
        at = seek(file, SeekFrom::Hole(data)).unwrap_or(end).min(end);
    }
}

/// hugetlbfs does not tell holes (`SEEK_DATA`). But nobody fills them any more, and a
/// page that is there can be mapped here.
fn poison_huge_holes(uffd: &Uffd, window: PageRange) {
    let page = RegionPages::Huge.size();
    for first in (0..window.pages().get()).step_by(page.index()) {
        let page = window.slice(first, page.get());
        // One by one: the program may have mapped something else in place of some.
        let there = uffd.register_minor(page).is_ok() && uffd.map_existing(page);
        if !there {
            poison(uffd, window, page, RegionPages::Huge);
        }
    }
}

fn poison(uffd: &Uffd, window: PageRange, hole: PageRange, pages: RegionPages) {
    if uffd.features() & FEATURE_POISON == 0 {
        fail(format_args!(
            "the owner of the shared region at {window} has ended with pages of it on its \
             devices, and this kernel cannot mark them; zeros in their place would be wrong \
             data, so the process ends now"
        ));
    }
    uffd.wherever_possible(hole, pages.size(), Uffd::poison_protected);
    uffd.wake(hole);
}
