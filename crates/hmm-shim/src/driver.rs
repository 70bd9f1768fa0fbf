//! The driver's commands, in terms of the engine. What each does and which
//! error numbers it gives is what `lib/test_hmm.c` of Linux 7.3 does.

use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hmm::{
    Access, Context, DeviceFaultError, DeviceId, Error, KernelError, MirrorEntry, PageCount,
    PageRange, PageResidency, Reach, SoftwareDevice, StayReason, VirtAddr,
};

use crate::engine::{self, CHUNK_PAGES, Engine, Unit};
use crate::errno::Errno;
use crate::files::{self, File};
use crate::uapi::{Command, FLAG_FAIL_ALLOC, Request, prot};
use crate::{real, times, user};

const PAGE: u64 = hmm::PAGE_SIZE;
/// Pages of a huge page.
const HUGE_PAGES: u64 = 512;
/// Pages that one look at the CPU's page table covers.
const SNAPSHOT_PAGES: u64 = 4096;
/// Tries more of a migration whose pages stay for a reason that may pass, and the
/// time between them.
const MAX_TRIES: u32 = 20;
const RETRY_NAP: Duration = Duration::from_micros(200);
/// Rounds of faults after which a command gives up.
const MAX_ROUNDS: u64 = 1000;

/// What a command did.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    cpages: u64,
    faults: u64,
}

/// ioctl(2) on a device file.
pub(crate) fn ioctl(file: File, number: libc::c_ulong, argument: u64) -> Result<(), Errno> {
    let engine = engine::current().ok_or(Errno::INVAL)?;
    let mut command = Command::default();
    let mut bytes = [0; size_of::<Command>()];
    user::read(argument, &mut bytes)?;
    for (field, bytes) in [&mut command.addr, &mut command.ptr, &mut command.npages]
        .into_iter()
        .zip(bytes.chunks_exact(8))
    {
        *field = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    }
    if !command.addr.is_multiple_of(PAGE) {
        return Err(Errno::INVAL);
    }
    let len = command.npages.wrapping_mul(PAGE);
    if command.addr >= command.addr.wrapping_add(len) {
        return Err(Errno::INVAL);
    }
    let request = Request::from_number(number).ok_or(Errno::INVAL)?;
    let done = carry_out(engine, file, request, command)?;
    let words = [
        command.addr,
        command.ptr,
        command.npages,
        done.cpages,
        done.faults,
    ];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    user::write(argument, &bytes)
}

fn carry_out(
    engine: &Engine,
    file: File,
    request: Request,
    command: Command,
) -> Result<Done, Errno> {
    let unit = engine.unit(file.unit).ok_or(Errno::INVAL)?;
    let device = unit.device;
    match request {
        Request::Flags => {
            files::set_flags(file.inode, command.npages);
            return Ok(Done::default());
        }
        Request::Release => {
            engine.hmm.vacate(device.id()).map_err(|_| Errno::INVAL)?;
            return Ok(Done::default());
        }
        _ => {}
    }
    let target = Job {
        engine,
        device,
        unit,
        range: PageRange::new(VirtAddr::new(command.addr), command.npages * PAGE).ok(),
        ptr: command.ptr,
    };
    match request {
        Request::Read | Request::ReadUnlocked => target.transfer(Access::Read),
        Request::Write => target.transfer(Access::Write),
        Request::MigrateToDevice => target.migrate_to_device(file),
        Request::MigrateToSystem => target.migrate_to_system(file),
        Request::Snapshot => target.snapshot(command),
        Request::Exclusive => target.exclusive(),
        Request::CheckExclusive => target.check_exclusive(),
        Request::Release | Request::Flags => unreachable!("carried out above"),
    }
}

/// The last descriptor of a device file was closed.
pub(crate) fn release(file: File) {
    if let Some(engine) = engine::current()
        && let Some(unit) = engine.unit(file.unit)
    {
        let _ = engine.hmm.vacate(unit.device.id());
    }
}

/// mmap(2) of a device: zeroed pages that are there at once, of this mapping
/// alone.
///
/// # Safety
/// As mmap(2).
pub(crate) unsafe fn mmap(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
) -> *mut c_void {
    // SAFETY: a file of this call's own, which the mapping keeps; the caller
    // answers for the address.
    unsafe {
        let pages = libc::memfd_create(c"hmm_dmirror".as_ptr(), libc::MFD_CLOEXEC);
        if pages < 0 {
            return libc::MAP_FAILED;
        }
        let size = libc::off_t::try_from(len).unwrap_or(libc::off_t::MAX);
        let mut mapping = libc::MAP_FAILED;
        if libc::ftruncate(pages, size) == 0 {
            mapping = real::mmap(address, len, protection, flags, pages, 0);
        }
        let error = Errno::last();
        real::close(pages);
        if mapping != libc::MAP_FAILED {
            libc::madvise(mapping, len, libc::MADV_POPULATE_READ);
        }
        error.set();
        mapping
    }
}

/// A command on a range of the program's memory.
struct Job<'a> {
    engine: &'a Engine,
    device: SoftwareDevice,
    unit: &'a Unit,
    /// `None` where no program can have memory.
    range: Option<PageRange>,
    ptr: u64,
}

impl Job<'_> {
    fn id(&self) -> DeviceId {
        self.device.id()
    }

    /// The device reads or writes the range, wherever its pages are.
    fn transfer(&self, access: Access) -> Result<Done, Errno> {
        let range = self.range.ok_or(Errno::FAULT)?;
        let len = range.pages().get().saturating_mul(PAGE);
        // The driver buffers all of it first.
        if len > memory_of_machine() {
            return Err(Errno::NOMEM);
        }
        if access == Access::Write {
            let len = usize::try_from(len).map_err(|_| Errno::NOMEM)?;
            user::probe(self.ptr, len)?;
        }
        self.engine.hmm.check(range, access).map_err(errno_of)?;
        self.on_device(range, access, Reach::Present)
    }

    /// The data of a range that was just brought to the device, for the program
    /// to see.
    fn read_back(&self, range: PageRange) -> Result<Done, Errno> {
        self.on_device(range, Access::Read, Reach::Resident)
    }

    /// One kernel on the device that copies between the range and the program.
    fn on_device(&self, range: PageRange, access: Access, reach: Reach) -> Result<Done, Errno> {
        let outcome = Mutex::new(Err(Errno::IO));
        let launched = self.device.launch(1, |context, _| {
            let result = self.copy(context, range, access, reach);
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = result;
            Ok(())
        });
        launched.map_err(|_| Errno::INVAL)?;
        outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies what the device has mapped, has it fault where it has not, goes
    /// on: each fault is a round.
    fn copy(
        &self,
        context: &Context,
        range: PageRange,
        access: Access,
        reach: Reach,
    ) -> Result<Done, Errno> {
        let total = range.pages().get();
        let mut buffer = self
            .unit
            .buffer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut done = Done::default();
        let mut rounds = 0;
        while done.cpages < total {
            let rest = range.slice(done.cpages, total - done.cpages);
            let part = rest.slice(0, rest.pages().get().min(CHUNK_PAGES));
            let at = self.ptr.wrapping_add(done.cpages * PAGE);
            let bytes = &mut buffer[..part.pages().bytes_usize()];
            let pages = match access {
                Access::Read => {
                    let pages = context.read_mapped(part, bytes);
                    user::write(at, &bytes[..pages.bytes_usize()])?;
                    pages
                }
                Access::Write => {
                    user::read(at, bytes)?;
                    context.write_mapped(part, bytes)
                }
            };
            done.cpages += pages.get();
            if pages > PageCount::ZERO {
                continue;
            }
            if rounds == MAX_ROUNDS {
                return Err(Errno::BUSY);
            }
            rounds += 1;
            let faulted = context
                .fault_range(rest, access, reach)
                .map_err(kernel_errno)?;
            match reach {
                Reach::Resident if faulted == PageCount::ZERO => return Err(Errno::NOENT),
                Reach::Resident => {}
                Reach::Present => done.faults += 1,
            }
        }
        Ok(done)
    }

    /// The range of a migration, and whether its first allocation is to fail.
    fn begin_migration(&self, file: File) -> Result<(PageRange, bool), Errno> {
        let range = self.range.ok_or(Errno::INVAL)?;
        let readable = self.engine.hmm.check(range, Access::Read);
        readable.map_err(|_| Errno::INVAL)?;
        let flags = files::set_flags(file.inode, 0);
        Ok((range, flags & FLAG_FAIL_ALLOC != 0))
    }

    fn migrate_to_device(&self, file: File) -> Result<Done, Errno> {
        let (range, fails) = self.begin_migration(file)?;
        let migrate = || {
            let (moved, rest) = if fails {
                self.migrate_with_failure(range)?
            } else {
                (0, Some(range))
            };
            let more = rest.map_or(Ok(0), |rest| self.migrate_from_system(rest))?;
            Ok((moved + more) * PAGE)
        };
        if self.unit.coherent {
            migrate()?;
        } else {
            times::TO_DEVICE.engine(migrate)?;
        }
        let done = times::TO_DEVICE.copy(range.bytes().get(), || self.read_back(range))?;
        Ok(Done { faults: 0, ..done })
    }

    /// The first allocation fails. A huge page moves in small pages then; a
    /// small one stays. Returns how many pages moved, and what is left to do.
    fn migrate_with_failure(&self, range: PageRange) -> Result<(u64, Option<PageRange>), Errno> {
        let huge = range.start().is_block_aligned()
            && range.pages().get() >= HUGE_PAGES
            && self.is_huge_in_system(range.slice(0, 1))?;
        let first = if huge { HUGE_PAGES } else { 1 };
        let mut moved = 0;
        if huge {
            // Not all of it at a time: that splits it.
            moved += self.migrate_from_system(range.slice(0, HUGE_PAGES / 2))?;
            moved += self.migrate_from_system(range.slice(HUGE_PAGES / 2, HUGE_PAGES / 2))?;
        }
        let left = range.pages().get() - first;
        Ok((moved, (left > 0).then(|| range.slice(first, left))))
    }

    fn is_huge_in_system(&self, page: PageRange) -> Result<bool, Errno> {
        let entries = self.engine.hmm.snapshot(page).map_err(errno_of)?;
        Ok(matches!(
            entries[..],
            [MirrorEntry::System { huge: true, .. } | MirrorEntry::None]
        ))
    }

    /// Moves what is in system memory; what is on another device stays there,
    /// as with the driver. Returns how many pages moved.
    fn migrate_from_system(&self, range: PageRange) -> Result<u64, Errno> {
        let id = self.id();
        let movable = |residency| match residency {
            PageResidency::Device(device)
            | PageResidency::Coherent(device)
            | PageResidency::Exclusive(device) => device == id,
            _ => true,
        };
        let mut moved = 0;
        self.for_runs(range, movable, |run| {
            for tries in 0.. {
                let report = match self.engine.hmm.migrate(run, id) {
                    Ok(report) => report,
                    Err(Error::NotMapped { .. }) => return Err(Errno::INVAL),
                    Err(error) => return Err(errno_of(error)),
                };
                moved += report.moved.get();
                let any = |reasons: &[StayReason]| {
                    let mut stayed = report.stayed.iter();
                    stayed.any(|stayed| reasons.contains(&stayed.reason))
                };
                if any(&[
                    StayReason::NotMapped,
                    StayReason::HugeTlb,
                    StayReason::Special,
                ]) {
                    return Err(Errno::INVAL);
                }
                // Other threads may fork and remap all the time.
                if tries == MAX_TRIES
                    || !any(&[
                        StayReason::SharedCow,
                        StayReason::Pinned,
                        StayReason::Busy,
                        StayReason::Raced,
                    ])
                {
                    break;
                }
                std::thread::sleep(RETRY_NAP);
            }
            Ok(())
        })?;
        Ok(moved)
    }

    fn migrate_to_system(&self, file: File) -> Result<Done, Errno> {
        let (range, fails) = self.begin_migration(file)?;
        let id = self.id();
        let here = |residency| match residency {
            PageResidency::Device(device) | PageResidency::Coherent(device) => device == id,
            _ => false,
        };
        let mut cpages = 0;
        let mut failed = fails;
        self.for_runs(range, here, |run| {
            let mut rest = Some(run);
            if std::mem::take(&mut failed) {
                let (moved, left) = self.evict_with_failure(run)?;
                cpages += moved;
                rest = left;
            }
            if let Some(rest) = rest {
                let mut complete = true;
                let mut evict = || {
                    let report = self.engine.hmm.evict(rest).map_err(errno_of)?;
                    cpages += report.moved.get();
                    complete = report.is_complete();
                    Ok(report.moved.get() * PAGE)
                };
                if self.unit.coherent {
                    evict()?;
                } else {
                    times::TO_SYSTEM.engine(evict)?;
                }
                if !complete {
                    return Err(Errno::NOMEM);
                }
            }
            Ok(())
        })?;
        Ok(Done { cpages, faults: 0 })
    }

    /// The first allocation of a page to come home to fails. A huge page comes
    /// in small pages then; for a small one the command ends.
    fn evict_with_failure(&self, run: PageRange) -> Result<(u64, Option<PageRange>), Errno> {
        let entries = self.engine.hmm.snapshot(run).map_err(errno_of)?;
        let huge = matches!(
            entries.first(),
            Some(MirrorEntry::Away { huge: true, .. } | MirrorEntry::System { huge: true, .. })
        );
        if !huge || run.pages().get() < HUGE_PAGES {
            return Err(Errno::NOMEM);
        }
        let mut moved = 0;
        for half in 0..2 {
            let part = run.slice(half * HUGE_PAGES / 2, HUGE_PAGES / 2);
            moved += self.engine.hmm.evict(part).map_err(errno_of)?.moved.get();
        }
        let left = run.pages().get() - HUGE_PAGES;
        Ok((moved, (left > 0).then(|| run.slice(HUGE_PAGES, left))))
    }

    /// Visits the longest runs of pages whose residency is wanted.
    fn for_runs(
        &self,
        range: PageRange,
        wanted: impl Fn(PageResidency) -> bool,
        mut visit: impl FnMut(PageRange) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let residency = self.engine.hmm.residency(range).map_err(errno_of)?;
        let pages = residency.pages();
        let mut from = 0;
        while from < pages.len() {
            let like = wanted(pages[from]);
            let run = pages[from..]
                .iter()
                .take_while(|&&page| wanted(page) == like)
                .count();
            if like {
                visit(range.slice(from as u64, run as u64))?;
            }
            from += run;
        }
        Ok(())
    }

    fn snapshot(&self, command: Command) -> Result<Done, Errno> {
        let Some(range) = self.range else {
            // No memory of a program is there.
            return self.report(command.npages, |_| Ok(vec![prot::ERROR]));
        };
        self.report(range.pages().get(), |from| {
            let pages = (range.pages().get() - from).min(SNAPSHOT_PAGES);
            let part = range.slice(from, pages);
            let entries = self.settled_snapshot(part)?;
            Ok(entries
                .iter()
                .map(|&entry| self.protection(entry))
                .collect())
        })
    }

    /// Copies what `next` says about pages to the program, part by part.
    fn report(
        &self,
        total: u64,
        next: impl Fn(u64) -> Result<Vec<u8>, Errno>,
    ) -> Result<Done, Errno> {
        let mut done = Done::default();
        while done.cpages < total {
            let part = next(done.cpages)?;
            user::write(self.ptr.wrapping_add(done.cpages), &part)?;
            done.cpages += part.len() as u64;
        }
        Ok(done)
    }

    /// A look at pages none of which is on its way.
    fn settled_snapshot(&self, range: PageRange) -> Result<Vec<MirrorEntry>, Errno> {
        const LOOKS: u32 = 1000;
        let in_flight = |entry: &MirrorEntry| {
            matches!(
                entry,
                MirrorEntry::Away {
                    residency: PageResidency::InFlight,
                    ..
                }
            )
        };
        for _ in 0..LOOKS {
            let entries = self.engine.hmm.snapshot(range).map_err(errno_of)?;
            if !entries.iter().any(in_flight) {
                return Ok(entries);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(Errno::BUSY)
    }

    fn protection(&self, entry: MirrorEntry) -> u8 {
        let access = |write| if write { prot::WRITE } else { prot::READ };
        let size = |huge| if huge { prot::PMD } else { 0 };
        match entry {
            MirrorEntry::Error => prot::ERROR,
            MirrorEntry::None => prot::NONE,
            MirrorEntry::System {
                write,
                huge,
                gigantic,
                zero,
                coherent,
            } => {
                let place = match coherent {
                    Some(device) if device == self.id() => prot::DEV_COHERENT_LOCAL,
                    Some(_) => prot::DEV_COHERENT_REMOTE,
                    None if zero && !huge => prot::ZERO,
                    None => 0,
                };
                let size = if gigantic { prot::PUD } else { size(huge) };
                place | access(write) | size
            }
            MirrorEntry::Away {
                residency: PageResidency::Device(device),
                write,
                huge,
            } if device == self.id() => prot::DEV_PRIVATE_LOCAL | access(write) | size(huge),
            // Another device's memory, or exclusive: not to be had without a
            // fault.
            MirrorEntry::Away { .. } => prot::NONE,
        }
    }

    fn exclusive(&self) -> Result<Done, Errno> {
        let range = self.range.ok_or(Errno::FAULT)?;
        let report = match self.engine.hmm.exclusive(range, self.id()) {
            Ok(report) => report,
            Err(Error::NotMapped { .. }) => return Err(Errno::FAULT),
            Err(error) => return Err(errno_of(error)),
        };
        let refusal = report.stayed.first().map(|stayed| stayed.reason);
        match refusal {
            None => {}
            Some(StayReason::NotMapped | StayReason::NoAccess) => return Err(Errno::FAULT),
            Some(_) => return Err(Errno::BUSY),
        }
        let done = self.read_back(range)?;
        Ok(Done { faults: 0, ..done })
    }

    fn check_exclusive(&self) -> Result<Done, Errno> {
        let Some(range) = self.range else {
            return Ok(Done::default());
        };
        let id = self.id();
        let taken = |residency| residency == PageResidency::Exclusive(id);
        let found = self.for_runs(range, taken, |_| Err(Errno::PERM));
        found.map(|()| Done::default())
    }
}

/// The driver's number for what the engine says.
fn errno_of(error: Error) -> Errno {
    match error {
        Error::Range(_) => Errno::FAULT,
        Error::NotMapped { .. } => Errno::FAULT,
        Error::Access(error) => fault_errno(error),
        Error::QueueFull { .. } => Errno::BUSY,
        Error::EngineMemory | Error::System(_) => Errno::NOMEM,
        _ => Errno::INVAL,
    }
}

fn kernel_errno(error: KernelError) -> Errno {
    match error {
        KernelError::Fault(error) => fault_errno(error),
        KernelError::Stuck { .. } => Errno::BUSY,
        _ => Errno::FAULT,
    }
}

fn fault_errno(error: DeviceFaultError) -> Errno {
    match error {
        DeviceFaultError::ReadOnly { .. } => Errno::PERM,
        DeviceFaultError::Unreachable {
            reason: StayReason::Busy,
            ..
        } => Errno::BUSY,
        DeviceFaultError::DeviceLost => Errno::IO,
        DeviceFaultError::ShuttingDown => Errno::INVAL,
        _ => Errno::FAULT,
    }
}

fn memory_of_machine() -> u64 {
    // SAFETY: asks for a number.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    u64::try_from(pages).map_or(u64::MAX, |pages| pages.saturating_mul(PAGE))
}
