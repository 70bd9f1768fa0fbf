//! System memory in place, where the driver imports it.
//!
//! ```text
//! driver's thread, no dispatch runs            whoever unmaps
//!   fault -> engine -> map_unwatched: a grant    clears entries, revokes the grant
//!   second mapping, populate, import             waits for the dispatch that runs
//!   grant revoked? give it back                  has the expelling thread give back
//!   else enter it                                  what was imported there, and waits
//!   ...
//!   the launch ends: all is given back
//! ```
//!
//! The engine grants a range with locks held, under which no driver may be called: one
//! that pins pages may take faults that the engine has to resolve. So a grant is all that
//! is noted then; it is taken up without locks, and entered if it still stands.
//!
//! Who unmaps holds locks too, and may be who the driver's thread waits for. So a thread
//! of its own gives imports back meanwhile. It calls the driver for that and nothing
//! else, and never waits for the engine.
//!
//! No import is made or given back while a kernel runs that could use it: what was
//! submitted before need not see a new one, and must have ended before an old one goes.
//! So kernels that wait for their pages cannot have any.

use ash::vk;
use hmm_hal::DeviceError;
use hmm_types::{Access, BLOCK_PAGES, PageCount, PageRange, VirtAddr};

use crate::VulkanError;
use crate::alias::Alias;
use crate::buffer::{Buffer, Use};
use crate::device::VulkanDevice;
use crate::error::ImportFailure;

/// Most imports at a time, of 2 MiB at most; with more, all are given back first.
pub const MAX_IMPORTS: usize = 1024;
/// Pages that are tried when the whole block does not go: what an entry can speak for.
const GROUP_PAGES: u64 = 16;

/// Where an import is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Used,
    /// Its entries are cleared; a kernel may still be using it.
    Condemned,
    /// None is.
    Doomed,
    /// Somebody gives it back.
    Leaving,
}

#[derive(Debug)]
struct Import {
    range: PageRange,
    standing: Standing,
    made_of: MadeOf,
}

/// What has to be given back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MadeOf {
    buffer: Buffer,
    alias: Alias,
}

#[derive(Clone, Copy, Debug)]
struct Grant {
    range: PageRange,
    number: u64,
}

/// The imports of a device, and the range that may be imported next. Under the gate's
/// lock, as the page table's entries are then.
#[derive(Debug)]
pub(crate) struct Imports {
    all: hmm_mem::Vec<Import>,
    granted: Option<Grant>,
    grants: u64,
    closed: bool,
}

impl Imports {
    pub(crate) const fn new() -> Self {
        Self {
            all: hmm_mem::vec(),
            granted: None,
            grants: 0,
            closed: false,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    pub(crate) const fn close(&mut self) {
        self.closed = true;
    }

    pub(crate) const fn is_closed(&self) -> bool {
        self.closed
    }

    fn grant(&mut self, range: PageRange) {
        self.grants += 1;
        self.granted = Some(Grant {
            range,
            number: self.grants,
        });
    }

    fn granted_at(&self, address: VirtAddr) -> Option<Grant> {
        self.granted.filter(|grant| grant.range.contains(address))
    }

    pub(crate) fn overlap(&self, range: PageRange) -> bool {
        self.all.iter().any(|import| import.range.overlaps(range))
    }

    /// Whether something there is imported or may be.
    pub(crate) fn concern(&self, range: PageRange) -> bool {
        self.overlap(range)
            || self
                .granted
                .is_some_and(|grant| grant.range.overlaps(range))
    }

    /// A range is being taken away: its grant is revoked, and imports that have a part of it
    /// are to go. Visits each as a whole, and tells whether there were any.
    pub(crate) fn condemn(&mut self, range: PageRange, mut visit: impl FnMut(PageRange)) -> bool {
        if self
            .granted
            .is_some_and(|grant| grant.range.overlaps(range))
        {
            self.granted = None;
        }
        let mut any = false;
        for import in &mut self.all {
            if import.range.overlaps(range) {
                any = true;
                if import.standing == Standing::Used {
                    import.standing = Standing::Condemned;
                    visit(import.range);
                }
            }
        }
        any
    }

    /// No kernel uses any more what was condemned there.
    pub(crate) fn doom(&mut self, range: PageRange) {
        for import in &mut self.all {
            if import.range.overlaps(range) && import.standing == Standing::Condemned {
                import.standing = Standing::Doomed;
            }
        }
    }

    /// Something for the expelling thread.
    pub(crate) fn take_doomed(&mut self) -> Option<MadeOf> {
        self.take(|import| import.standing == Standing::Doomed)
            .map(|(_, made_of)| made_of)
    }

    /// Something that nobody else gives back; it stays known until it is gone.
    fn take(&mut self, which: impl Fn(&Import) -> bool) -> Option<(PageRange, MadeOf)> {
        let mut all = self.all.iter_mut();
        let import = all.find(|one| one.standing != Standing::Leaving && which(one))?;
        import.standing = Standing::Leaving;
        Some((import.range, import.made_of))
    }

    fn leaving(&self, which: impl Fn(PageRange) -> bool) -> bool {
        let mut all = self.all.iter();
        all.any(|one| one.standing == Standing::Leaving && which(one.range))
    }

    pub(crate) fn gone(&mut self, what: MadeOf) {
        let buffer = what.buffer.handle;
        self.all
            .retain(|import| import.made_of.buffer.handle != buffer);
    }
}

impl VulkanDevice {
    /// Whether memory that stays is used in place.
    pub(crate) fn imports_memory(&self) -> bool {
        self.config().import_memory && self.gpu().physical.description.imports_pages()
    }

    /// Notes that a range may be imported.
    pub(crate) fn grant(&self, range: PageRange) -> Result<(), DeviceError> {
        if self.injector().map_fails() {
            self.counters().failures_injected.add(1);
            self.shoot_down(range);
            return Err(DeviceError::OutOfMemory);
        }
        self.gate().lock().imports.grant(range);
        Ok(())
    }

    /// Whether the engine has said that a page can be imported.
    pub(crate) fn is_granted(&self, address: VirtAddr) -> bool {
        self.imports_memory() && self.gate().lock().imports.granted_at(address).is_some()
    }

    /// Imports what was granted around a page, and enters it. On the driver's thread, while
    /// no dispatch runs. When the grant has been revoked nothing happens.
    pub(crate) fn import_granted(
        &self,
        address: VirtAddr,
        access: Access,
    ) -> Result<(), ImportFailure> {
        let page = PageRange::from_pages(address.page_floor(), PageCount::ONE);
        let (grant, full, known) = {
            let imports = &self.gate().lock().imports;
            let Some(grant) = imports.granted_at(address) else {
                return Ok(());
            };
            let full = imports.len() >= self.gpu().physical.most_imports();
            (grant, full, imports.overlap(page))
        };
        if full {
            self.drop_imports();
        } else if known {
            // For reading, so far: its pages may have to be made the file's own first.
            self.drop_imports_of(page);
        }
        // Dropping has revoked nothing: the range was granted after the last unmapping.
        let mut failure = None;
        for part in parts(grant.range, address) {
            if self.gate().lock().imports.overlap(part) {
                continue;
            }
            match self.import(part, access) {
                Ok(made_of) => return self.enter_import(part, access, grant, made_of),
                Err(why @ ImportFailure::Private) => {
                    failure = Some(why);
                    break;
                }
                Err(why) => failure = Some(why),
            }
        }
        self.counters().import_failures.add(1);
        failure.map_or(Ok(()), Err)
    }

    fn import(&self, range: PageRange, access: Access) -> Result<MadeOf, ImportFailure> {
        let alias = Alias::of(range)?;
        let made = alias.populate(access).and_then(|()| {
            // SAFETY: the alias is mapped, and stays until the buffer is destroyed
            // (`give_back`).
            unsafe { Buffer::import(self.gpu(), alias.base, range.bytes().get(), Use::InPlace) }
                .map_err(refused)
        });
        match made {
            Ok(buffer) => Ok(MadeOf { buffer, alias }),
            Err(why) => {
                // SAFETY: no buffer was made of it.
                unsafe { alias.unmap() };
                Err(why)
            }
        }
    }

    fn enter_import(
        &self,
        range: PageRange,
        access: Access,
        grant: Grant,
        made_of: MadeOf,
    ) -> Result<(), ImportFailure> {
        let (table, first) = (self.table(), made_of.buffer.device);
        let leaves = table.prepare(range, self.gate());
        let entered = match &leaves {
            Err(_) => Err(ImportFailure::Full),
            Ok(_) => {
                let mut state = self.gate().lock();
                let imports = &mut state.imports;
                let stands = imports
                    .granted
                    .is_some_and(|now| now.number == grant.number);
                // Nothing else is there, unless the engine has granted what it uses.
                if stands && table.fits(range, first, access) {
                    table.map(range, first, access);
                    imports.granted = None;
                    imports.all.push(Import {
                        range,
                        standing: Standing::Used,
                        made_of,
                    });
                    self.gate().count(&state);
                    Ok(true)
                } else {
                    Ok(false)
                }
            }
        };
        drop(leaves);
        if entered == Ok(true) {
            self.counters().imports.add(1);
            self.counters().bytes_imported.add(range.bytes().get());
        } else {
            // SAFETY: it was not entered, so no kernel has seen it.
            unsafe { self.give_back(made_of) };
        }
        entered.map(drop)
    }

    /// Gives all imports back. On the driver's thread, while no dispatch runs.
    pub(crate) fn drop_imports(&self) {
        self.drop_imports_that(|_| true);
    }

    fn drop_imports_of(&self, range: PageRange) {
        self.drop_imports_that(|import| import.overlaps(range));
    }

    fn drop_imports_that(&self, which: impl Fn(PageRange) -> bool) {
        if !self.imports_memory() || self.has_given_up() {
            return; // what still runs may use them
        }
        loop {
            let taken = {
                let mut state = self.gate().lock();
                let next = state.imports.take(|import| which(import.range));
                if let Some((range, _)) = &next {
                    self.table().clear(*range);
                } else if state.imports.leaving(&which) {
                    self.gate().wait_for_expelled(state);
                    continue;
                }
                next
            };
            let Some((_, made_of)) = taken else {
                return;
            };
            // SAFETY: no dispatch runs, none that comes finds it in the table, and who
            // takes an import is the one to give it back.
            unsafe { self.give_back(made_of) };
            self.gate().expelled(made_of);
        }
    }

    /// Body of the expelling thread.
    pub(crate) fn expel(&self) {
        while let Some(made_of) = self.gate().next_doomed() {
            // SAFETY: whoever doomed it has waited for the end of what could use it.
            unsafe { self.give_back(made_of) };
            self.gate().expelled(made_of);
        }
    }

    /// # Safety
    /// No kernel uses it or will, and nobody else gives it back.
    unsafe fn give_back(&self, made_of: MadeOf) {
        // SAFETY: the caller's contract; the alias is there until after the buffer.
        unsafe {
            made_of.buffer.destroy(self.gpu());
            made_of.alias.unmap();
        }
    }
}

/// What to try to import around a page of a range, most first.
fn parts(range: PageRange, address: VirtAddr) -> impl Iterator<Item = PageRange> {
    let page = address.page_floor();
    let around = move |pages: u64| {
        let start = VirtAddr::new(page.get() & !(pages * hmm_types::PAGE_SIZE - 1));
        PageRange::from_pages(start, PageCount::new(pages)).intersection(range)
    };
    let all = [u64::from(BLOCK_PAGES), GROUP_PAGES, 1].map(around);
    let mut last = None;
    all.into_iter().flatten().filter(move |&part| {
        let new = last != Some(part);
        last = Some(part);
        new
    })
}

fn refused(error: VulkanError) -> ImportFailure {
    match error {
        VulkanError::Call { call, result } => ImportFailure::Refused { call, result },
        _ => ImportFailure::Refused {
            call: "vkCreateBuffer",
            result: vk::Result::ERROR_OUT_OF_DEVICE_MEMORY,
        },
    }
}
