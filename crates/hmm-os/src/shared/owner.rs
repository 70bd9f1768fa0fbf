//! The owner's side: regions, and the peers that map them.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hmm_hal::{Event, Presence, Progress, SpaceError, SpaceId, Stop};
use hmm_sync::{Rank, RwLock};
use hmm_types::{PAGE_SIZE, PageCount, PageRange, VirtAddr};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, ftruncate,
    memfd_create, seek,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use rustix::net::{Shutdown, shutdown};

use super::bits::Bits;
use super::{NAME, RegionPages, wire};
use crate::message::{Message, translate};
use crate::space::LinuxSpace;
use crate::thread::EngineThread;
use crate::threads::EngineThreads;
use crate::uffd::Uffd;

/// Regions that a process can own at a time.
const MAX_REGIONS: usize = 64;
/// Peers that a region can have.
const MAX_PEERS: usize = 64;
/// How long a peer may take to introduce itself.
const PATIENCE: Duration = Duration::from_secs(5);
/// Keys of peers in the set of descriptors to wait for are from here on; below are
/// children's.
const PEER_KEYS: u64 = 1 << 32;

/// The key of a peer in the set of descriptors to wait for, if it is one.
pub(crate) fn peer_key(key: u64) -> Option<(usize, usize)> {
    let number = usize::try_from(key.checked_sub(PEER_KEYS)?).ok()?;
    Some((number / MAX_PEERS, number % MAX_PEERS))
}

#[derive(Debug)]
struct Peer {
    uffd: Uffd,
    /// Where it has the region.
    start: VirtAddr,
}

#[derive(Debug)]
struct Region {
    file: OwnedFd,
    /// Where the owner has it.
    window: PageRange,
    pages: RegionPages,
    /// Pages that are write-protected: whoever comes now must not write to them
    /// either.
    protected: Bits,
    /// Huge pages that have been taken out: the file does not tell (`SEEK_DATA`
    /// finds no holes in hugetlbfs). It has all the others from the start.
    taken_out: Bits,
    peers: [Option<Peer>; MAX_PEERS],
    /// The owner has unmapped its mapping, or moved it: what was away is lost.
    lost: bool,
}

impl Region {
    fn offset(&self, page: VirtAddr) -> u64 {
        page.pages_since(self.window.start()) * PAGE_SIZE
    }

    /// A part of the window as a peer has it.
    fn of_peer(&self, peer: &Peer, part: PageRange) -> PageRange {
        let first = part.start().pages_since(self.window.start());
        PageRange::from_pages(peer.start.plus_pages(first), part.pages())
    }

    fn peers(&self) -> impl Iterator<Item = &Peer> {
        self.peers.iter().flatten()
    }

    /// The pages that a part of the window touches, by number.
    fn numbers(&self, part: PageRange) -> Range<usize> {
        let page = self.pages.size().index();
        let within = |at: VirtAddr| PageCount::new(at.pages_since(self.window.start())).index();
        within(part.start()) / page..within(part.end()).div_ceil(page)
    }

    /// A page by its number.
    fn page(&self, number: usize) -> PageRange {
        let pages = self.pages.size();
        let first = PageCount::from(number * pages.index());
        self.window.slice(first.get(), pages.get())
    }

    /// The page that an address is in.
    fn page_around(&self, address: VirtAddr) -> PageRange {
        let page = PageRange::from_pages(address.page_floor(), PageCount::ONE);
        self.page(self.numbers(page).start)
    }

    fn note(&self, bits: &Bits, part: PageRange, on: bool) {
        self.numbers(part).for_each(|number| bits.set(number, on));
    }

    fn protected_pages(&self) -> impl Iterator<Item = PageRange> {
        let protected = |&number: &usize| self.protected.get(number);
        let numbers = self.numbers(self.window).filter(protected);
        numbers.map(|number| self.page(number))
    }

    /// Visits what is there of a part, and what has been taken out.
    fn visit_huge(&self, part: PageRange, visit: &mut dyn FnMut(PageRange, Presence)) {
        for number in self.numbers(part) {
            let presence = if self.taken_out.get(number) {
                Presence::Hole
            } else {
                Presence::Present { huge: true }
            };
            if let Some(span) = self.page(number).intersection(part) {
                visit(span, presence);
            }
        }
    }
}

/// The regions that this process owns.
#[derive(Debug)]
pub(crate) struct Regions {
    /// The lock keeps descriptors open while they are used. Peers come with it held
    /// for writing, so that nothing is protected meanwhile.
    slots: RwLock<hmm_mem::Vec<Option<Region>>>,
    /// Regions, so that nobody takes the lock where there are none.
    count: AtomicUsize,
    peers: AtomicUsize,
}

impl Regions {
    pub(crate) fn new() -> Self {
        let mut slots = hmm_mem::vec_with_capacity(MAX_REGIONS);
        slots.resize_with(MAX_REGIONS, || None);
        Self {
            slots: RwLock::new(Rank::System, slots),
            count: AtomicUsize::new(0),
            peers: AtomicUsize::new(0),
        }
    }

    pub(crate) fn peers(&self) -> usize {
        self.peers.load(Ordering::Acquire)
    }

    /// Whether there are peers, or regions that may get some.
    pub(crate) fn may_have_peers(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0 || self.peers() > 0
    }

    /// Does something with the region that has the address, and the part of the
    /// range in it.
    fn with<R>(&self, range: PageRange, call: impl FnOnce(&Region, PageRange) -> R) -> Option<R> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let slots = self.slots.read();
        let found = slots.iter().flatten().find_map(|region| {
            let part = region.window.intersection(range)?;
            Some((region, part))
        });
        let (region, part) = found.filter(|(region, _)| !region.lost)?;
        Some(call(region, part))
    }

    /// Whether the range lies in a region.
    pub(crate) fn has(&self, range: PageRange) -> bool {
        self.with(range, |_, part| part == range) == Some(true)
    }

    /// Whether the range lies in a region of huge pages.
    pub(crate) fn has_huge(&self, range: PageRange) -> bool {
        self.with(range, |region, part| {
            part == range && region.pages == RegionPages::Huge
        }) == Some(true)
    }

    /// Makes a region, and maps it for the owner.
    fn add(&self, bytes: u64, pages: RegionPages) -> io::Result<PageRange> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create(NAME, flags | pages.memfd_flags())?;
        ftruncate(&file, bytes)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        let window = map(&file, bytes).map_err(|error| pages.explain(error))?;
        if pages == RegionPages::Huge
            && let Err(error) = fallocate(&file, FallocateFlags::empty(), 0, bytes)
        {
            unmap(window);
            return Err(pages.explain(error.into()));
        }
        let mut slots = self.slots.write();
        let Some(slot) = slots.iter_mut().find(|slot| slot.is_none()) else {
            drop(slots);
            unmap(window);
            return Err(Errno::MFILE.into());
        };
        let count = window.pages().index() / pages.size().index();
        *slot = Some(Region {
            file,
            window,
            pages,
            protected: Bits::new(count),
            taken_out: Bits::new(count),
            peers: [const { None }; MAX_PEERS],
            lost: false,
        });
        self.count.fetch_add(1, Ordering::SeqCst);
        Ok(window)
    }

    /// Forgets a region. Nothing of it may be away; it stays mapped. False when its
    /// owner has unmapped it already.
    fn remove(&self, window: PageRange) -> bool {
        let mut slots = self.slots.write();
        let mut slot = slots.iter_mut();
        let found = slot.find(|slot| slot.as_ref().is_some_and(|region| region.window == window));
        let Some(region) = found.and_then(Option::take) else {
            return false;
        };
        self.count.fetch_sub(1, Ordering::AcqRel);
        !region.lost
    }

    /// The owner has changed its mappings: memory that is not where it was cannot be
    /// served any more.
    pub(crate) fn changed(&self, event: &Event) {
        let (Event::Unmap {
            space: SpaceId::OWN,
            range,
        }
        | Event::Remap {
            space: SpaceId::OWN,
            from: range,
            ..
        }) = *event
        else {
            return;
        };
        if self.with(range, |_, _| ()).is_none() {
            return;
        }
        for region in self.slots.write().iter_mut().flatten() {
            region.lost |= region.window.overlaps(range);
        }
    }

    /// Has the kernel do the same to a range in all peers that it did in the owner,
    /// wherever they still have it.
    fn in_peers(
        region: &Region,
        part: PageRange,
        call: impl Fn(&Uffd, PageRange) -> Progress,
    ) -> Option<Stop> {
        let mut again = false;
        for peer in region.peers() {
            again |=
                peer.uffd
                    .wherever_possible(region.of_peer(peer, part), region.pages.size(), &call);
        }
        again.then_some(Stop::Again)
    }

    /// Write-protects in all peers what is protected in the owner, or the opposite.
    pub(crate) fn write_protect(&self, range: PageRange, on: bool) -> Option<Stop> {
        self.with(range, |region, part| {
            region.note(&region.protected, part, on);
            Self::in_peers(region, part, |uffd, part| uffd.write_protect(part, on))
        })
        .flatten()
    }

    /// Pages are there again: peers may write to them, and look again.
    pub(crate) fn placed(&self, range: PageRange) {
        self.with(range, |region, part| {
            region.note(&region.taken_out, part, false)
        });
        let _ = self.write_protect(range, false);
    }

    /// Whether a huge page is there; `None` when it is no region's.
    pub(crate) fn has_page(&self, page: PageRange) -> Option<bool> {
        self.with(page, |region, part| {
            let number = region.numbers(part).start;
            (region.pages == RegionPages::Huge).then(|| !region.taken_out.get(number))
        })
        .flatten()
    }

    /// Whoever touches the pages gets SIGBUS, in peers as in the owner.
    pub(crate) fn poison(&self, range: PageRange) {
        self.with(range, |region, part| {
            Self::in_peers(region, part, Uffd::poison_protected)
        });
    }

    pub(crate) fn wake(&self, range: PageRange) {
        self.with(range, |region, part| {
            for peer in region.peers() {
                peer.uffd.wake(region.of_peer(peer, part));
            }
        });
    }

    /// Takes pages out of all processes; `None` when the range is no region's.
    pub(crate) fn punch(&self, range: PageRange) -> Option<Result<(), SpaceError>> {
        self.with(range, |region, part| {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let offset = region.offset(part.start());
            let done = fallocate(&region.file, flags, offset, part.bytes().get());
            if done.is_ok() {
                region.note(&region.taken_out, part, true);
            }
            done.map_err(|error| SpaceError {
                operation: "dropping shared pages with fallocate(FALLOC_FL_PUNCH_HOLE)",
                errno: error.raw_os_error(),
            })
        })
    }

    /// Visits what the file has of a range; `None` when it is no region's.
    pub(crate) fn visit(
        &self,
        range: PageRange,
        visit: &mut dyn FnMut(PageRange, Presence),
    ) -> Option<rustix::io::Result<()>> {
        self.with(range, |region, part| {
            if region.pages == RegionPages::Huge {
                region.visit_huge(part, visit);
                return Ok(());
            }
            let end = region.offset(part.end());
            let mut at = region.offset(part.start());
            let page_at = |offset: u64| region.window.start().plus_pages(offset / PAGE_SIZE);
            while at < end {
                let data = match seek(&region.file, SeekFrom::Data(at)) {
                    // There is nothing behind it.
                    Err(Errno::NXIO) => end,
                    data => data?.min(end),
                };
                if at < data {
                    visit(PageRange::span(page_at(at), page_at(data)), Presence::Hole);
                }
                if data == end {
                    break;
                }
                at = seek(&region.file, SeekFrom::Hole(data))?.min(end);
                // None, if it was dropped between the two looks.
                if data < at {
                    let there = Presence::Present { huge: false };
                    visit(PageRange::span(page_at(data), page_at(at)), there);
                }
            }
            Ok(())
        })
    }

    /// Reads a message of a peer, as one of the owner's.
    pub(crate) fn read(&self, region: usize, peer: usize) -> Option<Event> {
        let slots = self.slots.read();
        let region = slots.get(region)?.as_ref()?;
        let peer = region.peers.get(peer)?.as_ref()?;
        let mut buffer = [MaybeUninit::uninit(); 1];
        let messages = peer.uffd.read(&mut buffer).ok()?;
        let Message::Event(Event::Fault {
            address,
            kind,
            access,
            ..
        }) = translate(SpaceId::OWN, messages.first()?)?
        else {
            return None;
        };
        let since = address.page_floor().pages_since(peer.start);
        let own = region.window.start().plus_pages(since);
        if region.lost {
            // The owner's engine does not know the page any more.
            let page = region.of_peer(peer, region.page_around(own));
            let _ = peer.uffd.poison_protected(page);
            peer.uffd.wake(page);
            return None;
        }
        Some(Event::Fault {
            space: SpaceId::OWN,
            address: own,
            kind,
            access,
            thread: 0,
        })
    }

    /// A process that has connected becomes a peer. Returns its number.
    fn admit(&self, window: PageRange, stream: &UnixStream, set: &OwnedFd) -> io::Result<usize> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let bytes = window.bytes().get();
        self.with(window, |region, _| {
            wire::send(stream, wire::HELLO, bytes, Some(region.file.as_fd()))
        })
        .unwrap_or(Err(io::ErrorKind::NotFound.into()))?;
        let (start, Some(descriptor)) = wire::receive(stream, wire::HELLO)? else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let number = {
            let mut slots = self.slots.write();
            let found = (0..).zip(slots.iter_mut());
            let (at, region) = found
                .filter_map(|(at, slot)| Some((at, slot.as_mut()?)))
                .find(|(_, region)| region.window == window)
                .ok_or(io::ErrorKind::NotFound)?;
            let free = region.peers.iter().position(Option::is_none);
            let number = free.ok_or(Errno::MFILE)?;
            let peer = Peer {
                uffd: Uffd::of_child(descriptor, 0),
                start: VirtAddr::new(start),
            };
            for page in region.protected_pages() {
                let page = region.of_peer(&peer, page);
                if peer.uffd.write_protect(page, true).stop.is_some() {
                    return Err(io::ErrorKind::InvalidData.into());
                }
            }
            let key = PEER_KEYS + (at * MAX_PEERS + number) as u64;
            epoll::add(
                set,
                peer.uffd.as_fd(),
                EventData::new_u64(key),
                EventFlags::IN,
            )?;
            region.peers[number] = Some(peer);
            number
        };
        self.peers.fetch_add(1, Ordering::AcqRel);
        wire::send(stream, wire::READY, 0, None).inspect_err(|_| {
            self.dismiss(window, number, set);
        })?;
        Ok(number)
    }

    fn dismiss(&self, window: PageRange, number: usize, set: &OwnedFd) {
        let mut slots = self.slots.write();
        let mut regions = slots.iter_mut().flatten();
        if let Some(region) = regions.find(|region| region.window == window)
            && let Some(peer) = region.peers[number].take()
        {
            // The peer has the same file open: closing it here ends nothing.
            let _ = epoll::delete(set, peer.uffd.as_fd());
            self.peers.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// A region that is shared: its memory, and the thread that admits peers. Dropped
/// without [`Sharing::end`] it goes on for as long as the process runs.
#[derive(Debug)]
pub struct Sharing {
    window: PageRange,
    /// The same socket as the thread's.
    listener: UnixListener,
    thread: EngineThread,
}

impl Sharing {
    /// Makes memory that other processes can attach at `path`, where a socket is
    /// made that only this user can use. On an engine thread.
    ///
    /// # Errors
    /// When the kernel cannot watch shared memory or has no memory for it, or the
    /// path is taken. Then nothing was changed.
    pub fn start(
        threads: &EngineThreads,
        space: &'static LinuxSpace,
        bytes: u64,
        pages: RegionPages,
        path: &Path,
    ) -> io::Result<Self> {
        if !space.can_share(pages) {
            return Err(Errno::OPNOTSUPP.into());
        }
        let listener = UnixListener::bind(path)?;
        let shared = Self::share(threads, space, bytes, pages, path, listener);
        if shared.is_err() {
            let _ = fs::remove_file(path);
        }
        shared
    }

    fn share(
        threads: &EngineThreads,
        space: &'static LinuxSpace,
        bytes: u64,
        pages: RegionPages,
        path: &Path,
        listener: UnixListener,
    ) -> io::Result<Self> {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        let own = listener.try_clone()?;
        let window = space.regions().0.add(bytes, pages)?;
        let serve = move || serve_peers(space, window, &own);
        match threads.spawn("hmm-share", None, serve) {
            Ok(thread) => Ok(Self {
                window,
                listener,
                thread,
            }),
            Err(error) => {
                space.regions().0.remove(window);
                unmap(window);
                Err(error)
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub const fn window(&self) -> PageRange {
        self.window
    }

    /// Sends the peers away, with the memory as it is: all of it must be home. It
    /// stays mapped, for the caller to [`unmap`]; false when the program has unmapped
    /// it already. On an engine thread.
    pub fn end(self, space: &LinuxSpace) -> bool {
        let _ = shutdown(&self.listener, Shutdown::Both);
        self.thread.join();
        space.regions().0.remove(self.window)
    }
}

/// Body of the thread that admits a region's peers, until `listener` is shut down.
/// Then everything is home, and the peers are told.
fn serve_peers(space: &LinuxSpace, window: PageRange, listener: &UnixListener) {
    let (regions, set) = space.regions();
    let mut connections: hmm_mem::Vec<(usize, UnixStream)> = hmm_mem::vec();
    loop {
        let mut waits = hmm_mem::vec_with_capacity(1 + connections.len());
        waits.push(PollFd::new(listener, PollFlags::IN));
        let peers = connections.iter();
        waits.extend(peers.map(|(_, stream)| PollFd::new(stream, PollFlags::IN)));
        if poll(&mut waits, None).is_err() {
            continue;
        }
        let called = waits[0].revents();
        let mut readable = hmm_mem::vec_with_capacity(connections.len());
        readable.extend(waits[1..].iter().map(|wait| !wait.revents().is_empty()));
        drop(waits);
        // A peer says nothing any more: it has gone.
        let mut gone = readable.iter();
        connections.retain(|(number, _)| {
            let gone = gone.next() == Some(&true);
            if gone {
                regions.dismiss(window, *number, set);
            }
            !gone
        });
        if called.contains(PollFlags::HUP) {
            break;
        }
        if called.contains(PollFlags::IN)
            && let Ok((stream, _)) = listener.accept()
            && let Ok(number) = regions.admit(window, &stream, set)
        {
            connections.push((number, stream));
        }
    }
    let all_home = regions.has(window);
    for (number, stream) in connections {
        // Else they find out for themselves what is lost, as if the process had ended.
        if all_home {
            let _ = wire::send(&stream, wire::BYE, 0, None);
        }
        regions.dismiss(window, number, set);
    }
}

/// A shared mapping that forked children do not have: nobody would serve it there.
pub(super) fn map(file: &OwnedFd, bytes: u64) -> io::Result<PageRange> {
    let len = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let at = unsafe { mmap(ptr::null_mut(), len, access, MapFlags::SHARED, file, 0) }?;
    at.expose_provenance();
    let window = PageRange::new(VirtAddr::of(at), bytes).map_err(|_| Errno::INVAL)?;
    // SAFETY: the mapping just made; no data is dropped.
    let kept = unsafe { madvise(at, len, Advice::LinuxDontFork) };
    if let Err(error) = kept {
        unmap(window);
        return Err(error.into());
    }
    Ok(window)
}

/// Unmaps a region that is shared no more: see [`Sharing::end`].
pub fn unmap(window: PageRange) {
    let at = ptr::with_exposed_provenance_mut(window.start().addr());
    // SAFETY: a mapping that `map` has made, whose user is done with it.
    let _ = unsafe { munmap(at, window.pages().bytes_usize()) };
}
