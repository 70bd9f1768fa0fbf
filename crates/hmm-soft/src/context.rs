//! What a kernel can do: access any address of the process.

use std::cell::Cell;
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr;
use std::time::{Duration, Instant};

use hmm_device::read_ahead;
use hmm_hal::{DeviceFaultError, Resolution};
use hmm_types::{Access, PAGE_SIZE, USER_END, VirtAddr};

use crate::guard::{self, Signalled};
use crate::page_table::LeafAddress;
use crate::shootdown::{Shootdown, WorkerSlot};
use crate::tlb::Tlb;
use crate::{KernelError, Plain, SoftDevice};

/// Bytes of a page, as the index type.
pub(crate) const PAGE: usize = 1 << hmm_types::PAGE_SHIFT;

/// How often the engine may map a page for one access, and the page be gone
/// again before the access happened. After that the access is done in place,
/// as a CPU access: the page comes home for it, and the access ends.
pub const THRASH_LIMIT: u32 = 64;
/// How often the engine may say "wait" for one access.
pub const RETRY_LIMIT: u64 = 1 << 20;
/// For how long it may.
pub const RETRY_TIME: Duration = Duration::from_secs(10);

/// A page of engine memory that data passes through between frames and memory
/// of the program: the latter may fault, which is forbidden in an access
/// section.
#[repr(align(4096))]
struct Bounce(#[allow(dead_code, reason = "accessed through its address")] MaybeUninit<[u8; PAGE]>);

/// A kernel's view of memory, on one worker.
///
/// All accesses take plain pointers of the process. A page that is not on the
/// device, nor mapped for it in place, faults into the engine; the access is
/// done when the page has come. Plain accesses are as atomic as a CPU's: up to
/// 8 bytes when aligned. Unaligned ones, and those that cross a page, may be
/// seen in parts.
pub struct Context {
    device: &'static SoftDevice,
    shootdown: &'static Shootdown,
    slot: &'static WorkerSlot,
    frames: *mut u8,
    tlb: hmm_mem::Box<Tlb>,
    bounce: hmm_mem::Box<Bounce>,
    index: Cell<usize>,
    worker: usize,
}

/// Where an access goes.
enum Route {
    /// To what the page table says, in an access section.
    Section,
    /// To the very address.
    InPlace,
}

/// How long one access has waited for its page.
#[derive(Default)]
struct Patience {
    mapped: u32,
    retries: u64,
    since: Option<Instant>,
}

impl Context {
    pub(crate) fn new(device: &'static SoftDevice, worker: usize) -> Self {
        Self {
            device,
            shootdown: device.shootdown(),
            slot: &device.shootdown().slots()[worker],
            frames: device.memory().base(),
            tlb: hmm_mem::boxed(Tlb::new()),
            bounce: hmm_mem::boxed(Bounce(MaybeUninit::zeroed())),
            index: Cell::new(0),
            worker,
        }
    }

    /// The index that the kernel works on.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index.get()
    }

    pub(crate) fn set_index(&self, index: usize) {
        self.index.set(index);
    }

    /// The worker that it runs on, counted from 0.
    #[must_use]
    pub fn worker(&self) -> usize {
        self.worker
    }

    /// Loads a value.
    ///
    /// # Errors
    /// [`KernelError`] when the access cannot be done.
    #[inline]
    pub fn load<T: Plain>(&self, at: *const T) -> Result<T, KernelError> {
        let address = at.addr();
        if fits::<T>(address) {
            // SAFETY: `access` gives a pointer to as many bytes as lie in the
            // page, at the same offset, and `fits` has checked both.
            self.access::<false, T>(address, &|at| unsafe { at.cast::<T>().read_volatile() })
        } else {
            let mut value = MaybeUninit::<T>::uninit();
            self.copy_in(address, value.as_mut_ptr().cast(), size_of::<T>())?;
            // SAFETY: all bytes were written, and any bytes are a `Plain` value.
            Ok(unsafe { value.assume_init() })
        }
    }

    /// Stores a value.
    ///
    /// # Errors
    /// [`KernelError`] when the access cannot be done. A store that crosses a
    /// page may have changed the first page then.
    #[inline]
    pub fn store<T: Plain>(&self, at: *mut T, value: T) -> Result<(), KernelError> {
        let address = at.addr();
        if fits::<T>(address) {
            // SAFETY: as in `load`.
            self.access::<true, ()>(address, &|at| unsafe {
                at.cast::<T>().write_volatile(value)
            })
        } else {
            self.copy_out(address, ptr::from_ref(&value).cast(), size_of::<T>())
        }
    }

    /// Loads as many values as the slice has room for.
    ///
    /// # Errors
    /// [`KernelError`] when the access cannot be done; the slice may hold part
    /// of the values then.
    pub fn read_slice<T: Plain>(&self, at: *const T, into: &mut [T]) -> Result<(), KernelError> {
        self.copy_in(at.addr(), into.as_mut_ptr().cast(), size_of_val(into))
    }

    /// Stores all values of a slice.
    ///
    /// # Errors
    /// [`KernelError`] when the access cannot be done; whole pages before the
    /// one that could not be written may have changed then.
    pub fn write_slice<T: Plain>(&self, at: *mut T, from: &[T]) -> Result<(), KernelError> {
        self.copy_out(at.addr(), from.as_ptr().cast(), size_of_val(from))
    }

    /// One access: `operation` gets a pointer to where the byte at `address`
    /// is now, and to all that follows in its page. It must not touch anything
    /// that can fault but that page, nor panic.
    #[inline(always)]
    pub(crate) fn access<const WRITE: bool, R>(
        &self,
        address: usize,
        operation: &impl Fn(*mut u8) -> R,
    ) -> Result<R, KernelError> {
        if let Some(result) = self.in_section::<WRITE, R>(address, operation) {
            return Ok(result);
        }
        self.access_slow::<WRITE, R>(address, operation)
    }

    #[cold]
    #[inline(never)]
    fn access_slow<const WRITE: bool, R>(
        &self,
        address: usize,
        operation: &impl Fn(*mut u8) -> R,
    ) -> Result<R, KernelError> {
        let mut patience = Patience::default();
        loop {
            match self.settle(address, WRITE, &mut patience)? {
                Route::Section => {
                    if let Some(result) = self.in_section::<WRITE, R>(address, operation) {
                        return Ok(result);
                    }
                }
                // A CPU access at the very address: whatever happens to the
                // page meanwhile, the kernel and the engine keep it coherent. If
                // there is nothing any more, the access is in error.
                Route::InPlace => {
                    let access = || operation(ptr::with_exposed_provenance_mut(address));
                    return guard::attempt(access).map_err(|signalled| {
                        let address = VirtAddr::new(address as u64);
                        match signalled {
                            Signalled::Bus => KernelError::Bus { address },
                            Signalled::Segv => DeviceFaultError::NotMapped { address }.into(),
                        }
                    });
                }
            }
        }
    }

    /// The access, if the TLB and the page table allow it as they are.
    #[inline(always)]
    pub(crate) fn in_section<const WRITE: bool, R>(
        &self,
        address: usize,
        operation: &impl Fn(*mut u8) -> R,
    ) -> Option<R> {
        let section = self.shootdown.enter(self.slot);
        let slot = self.tlb.find(address)?;
        // SAFETY: cached leaves stay until the device is closed, which waits
        // for this worker's end.
        let entry = unsafe { (*slot.leaf).entry(address) };
        let page = if entry.is_frame_for(WRITE) {
            // SAFETY: a mapped frame lies in the device's memory (checked when
            // it was mapped), and cannot be freed before the section ends.
            unsafe { self.frames.add(entry.frame_offset()) }
        } else if entry.is_staged_for(WRITE) {
            // SAFETY: directories stay as leaves do.
            let host = unsafe { (*slot.directory).host_page(address) };
            ptr::with_exposed_provenance_mut(host)
        } else {
            return None;
        };
        // SAFETY: the offset lies in the page.
        let result = operation(unsafe { page.add(address % PAGE) });
        drop(section);
        Some(result)
    }

    /// Makes the page accessible, through the engine if need be.
    #[inline(never)]
    fn settle(
        &self,
        address: usize,
        write: bool,
        patience: &mut Patience,
    ) -> Result<Route, KernelError> {
        let counters = &self.slot.counters;
        let at = VirtAddr::new(address as u64);
        if at.get() < PAGE_SIZE || at.get() >= USER_END {
            return Err(DeviceFaultError::NotMapped { address: at }.into());
        }
        let access = if write { Access::Write } else { Access::Read };
        loop {
            if let Some(found) = self.device.table().leaf(address) {
                self.cache_leaf(address, found);
                // SAFETY: leaves stay until the device is closed, which waits
                // for this worker's end.
                let entry = unsafe { (*found.leaf).entry(address) };
                if entry.is_frame_for(write) || entry.is_staged_for(write) {
                    return Ok(Route::Section);
                }
                if entry.is_in_place_for(write) {
                    counters.in_place.bump();
                    return Ok(Route::InPlace);
                }
            }
            if patience.mapped >= THRASH_LIMIT {
                counters.thrash_in_place.bump();
                return Ok(Route::InPlace);
            }
            counters.faults.bump();
            let paused = self.shootdown.pause();
            let resolution = self.device.fault(at, access)?;
            if resolution == Resolution::Retry {
                self.device.wait_for_progress();
            }
            drop(paused);
            match resolution {
                Resolution::Mapped => patience.mapped += 1,
                Resolution::Retry => {
                    counters.retries.bump();
                    patience.retries += 1;
                    let since = *patience.since.get_or_insert_with(Instant::now);
                    if patience.retries >= RETRY_LIMIT || since.elapsed() >= RETRY_TIME {
                        return Err(KernelError::Stuck {
                            address: at,
                            rounds: patience.retries,
                        });
                    }
                }
            }
        }
    }

    pub(crate) const fn device(&self) -> &'static SoftDevice {
        self.device
    }

    /// The worker waits for the engine until the value is dropped.
    pub(crate) fn pause(&self) -> crate::shootdown::Paused<'static> {
        self.shootdown.pause()
    }

    /// This worker's page for data that is on its way.
    pub(crate) fn bounce_page(&self) -> *mut u8 {
        ptr::from_ref(&*self.bounce).cast_mut().cast()
    }

    /// Has the TLB know a leaf.
    pub(crate) fn cache_leaf(&self, address: usize, found: LeafAddress) {
        if self.tlb.find(address).is_none() {
            self.slot.counters.tlb_misses.bump();
            self.tlb.fill(address, found);
        }
    }

    /// Whether bytes may be touched in an access section: this worker's stack
    /// and the engine's memory never migrate.
    pub(crate) fn never_faults(&self, at: *const u8, len: usize) -> bool {
        let in_arena = || {
            hmm_mem::arena_range().is_some_and(|arena| {
                arena.start().addr() <= at.addr() && at.addr() + len <= arena.end().addr()
            })
        };
        self.on_own_stack(at, len) || in_arena()
    }

    /// Reads bytes, page by page.
    fn copy_in(&self, address: usize, into: *mut u8, len: usize) -> Result<(), KernelError> {
        let direct = self.on_own_stack(into, len);
        let bounce = self.bounce_page();
        for_pages(address, len, |address, offset, len| {
            // SAFETY: the caller has `offset + len` bytes there.
            let into = unsafe { into.add(offset) };
            let stop = if direct { into } else { bounce };
            // SAFETY: `access` gives a pointer to the rest of the page, and
            // `len` does not reach beyond; the bounce page is a page long.
            self.access::<false, ()>(address, &|from| unsafe {
                read_ahead(from.cast_const(), stop, len);
            })?;
            if !direct {
                // SAFETY: as above; outside of the section, so this may fault.
                unsafe { ptr::copy_nonoverlapping(bounce.cast_const(), into, len) };
            }
            Ok(())
        })
    }

    /// Writes bytes, page by page.
    fn copy_out(&self, address: usize, from: *const u8, len: usize) -> Result<(), KernelError> {
        let direct = self.on_own_stack(from, len);
        let bounce = self.bounce_page();
        for_pages(address, len, |address, offset, len| {
            // SAFETY: the caller has `offset + len` bytes there.
            let from = unsafe { from.add(offset) };
            let stop = if direct {
                from
            } else {
                // SAFETY: the bounce page is a page long, and nobody else's;
                // outside of the section, so this may fault.
                unsafe { ptr::copy_nonoverlapping(from, bounce, len) };
                bounce.cast_const()
            };
            // SAFETY: as in `copy_in`.
            self.access::<true, ()>(address, &|to| unsafe {
                ptr::copy_nonoverlapping(stop, to, len);
            })
        })
    }

    /// Whether bytes lie on this worker's stack, which never migrates, so that
    /// they may be touched in an access section.
    fn on_own_stack(&self, at: *const u8, len: usize) -> bool {
        let [first, end] = self.slot.stack_range();
        first <= at.addr() && at.addr() < end && len <= end - at.addr()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("worker", &self.worker)
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

/// Whether a value at the address is aligned and lies in one page.
#[inline(always)]
const fn fits<T>(address: usize) -> bool {
    address.is_multiple_of(align_of::<T>())
        && (size_of::<T>() == align_of::<T>() || address % PAGE + size_of::<T>() <= PAGE)
}

/// Visits the parts of a range of bytes that lie in one page each: address,
/// offset in the range, length.
#[inline]
fn for_pages(
    address: usize,
    len: usize,
    mut visit: impl FnMut(usize, usize, usize) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    if address.checked_add(len).is_none() {
        return Err(KernelError::Overflow {
            address: VirtAddr::new(address as u64),
            len_bytes: len,
        });
    }
    let mut offset = 0;
    while offset < len {
        let at = address + offset;
        let part = (PAGE - at % PAGE).min(len - offset);
        visit(at, offset, part)?;
        offset += part;
    }
    Ok(())
}
