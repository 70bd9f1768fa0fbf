//! How operations go on.

use hmm_hal::{DeviceFaultError, Resolution, SpaceId};
use hmm_types::{Access, DeviceId, PageRange, VirtAddr};

use crate::actor::{Actor, Kind, Piece, Task, Then, Touching};
use crate::calls::Touch;
use crate::device::Attempt;
use crate::engine::EngineUnderTest;
use crate::oracle::Flux;
use crate::page::{Payload, ZEROS};
use crate::program::Action;
use crate::world::{Pinned, World};

/// Faults that a kernel takes in a row before others get their turn.
const MAX_DEVICE_FAULTS: u32 = 4;

impl Action {
    fn apply(self, offset: usize, data: &mut Payload) {
        match self {
            Self::Load(_) => {}
            Self::Store(len, value) => data[offset..offset + len].fill(value),
            Self::Add(value) => {
                let Some(bytes) = data[offset..].first_chunk_mut::<8>() else {
                    unreachable!("simulator: an atomic reaches over the page");
                };
                *bytes = u64::from_le_bytes(*bytes).wrapping_add(value).to_le_bytes();
            }
        }
    }
}

fn offset_of(address: VirtAddr) -> usize {
    usize::try_from(address.get() - address.page_floor().get()).unwrap_or(usize::MAX)
}

impl<E: EngineUnderTest> World<E> {
    /// Goes on with what an actor is doing; says what it is doing then.
    pub(crate) fn advance(&self, kind: Kind, task: Task) -> Task {
        match (task, kind) {
            (Task::Access(address, action), Kind::Device(index)) => {
                self.device_access(index, address, action)
            }
            (Task::Access(address, action), Kind::Thread { space, number }) => {
                self.cpu_access(space, number, address, action)
            }
            (Task::Wait(ticket, then), _) => {
                if self.space.is_unread(ticket) {
                    return task;
                }
                match then {
                    Then::Settle(change) => self.scene().oracle.settle(change),
                    Then::SettleBoth(one, two) => {
                        let mut scene = self.scene();
                        scene.oracle.settle(one);
                        scene.oracle.settle(two);
                    }
                    Then::Fork(child) => self.fork_returned(child),
                }
                Task::Idle
            }
            (Task::Discard(piece, rest), Kind::Thread { space, .. }) => {
                self.discard(space, piece, rest)
            }
            (Task::Touch(range, next, why), Kind::Thread { number, .. }) => {
                self.touch_pages(number, range, next, why)
            }
            _ => task,
        }
    }

    fn cpu_access(&self, space: SpaceId, thread: u32, address: VirtAddr, action: Action) -> Task {
        let task = Task::Access(address, action);
        let offset = offset_of(address);
        let access = action.access();
        let mut guard = self.scene();
        let scene = &mut *guard;
        if access == Access::Write && scene.oracle.flux_at(space, address).is_some() {
            // The program does not write to what it is changing.
            return task;
        }
        let allowed = scene.oracle.allows(space, address, access);
        let mut seen = ZEROS;
        let touched = self
            .space
            .touch(space, thread, address, access, &mut |data| {
                action.apply(offset, data);
                seen = *data;
            });
        match touched {
            Touch::Stopped => {
                scene.report.stops += 1;
                return task;
            }
            Touch::Segv if allowed => {
                scene.fail(format!("{space:?}: {action:?} at {address} is a SIGSEGV"));
            }
            Touch::Segv => {}
            Touch::Sigbus if !allowed || !scene.oracle.is_lost(space, address) => {
                scene.fail(format!("{space:?}: {action:?} at {address} is a SIGBUS"));
            }
            Touch::Sigbus => {}
            Touch::Done if !allowed => {
                scene.fail(format!(
                    "{space:?}: {action:?} at {address} must be a SIGSEGV"
                ));
            }
            Touch::Done => {
                scene.report.cpu_accesses += 1;
                if let Action::Load(len) = action {
                    let seen = &seen[offset..offset + len];
                    if let Err(message) = scene.oracle.read(space, address, offset, seen) {
                        scene.fail(message);
                    }
                } else {
                    let edit = |data: &mut Payload| action.apply(offset, data);
                    scene.oracle.write(space, address, false, edit);
                }
            }
        }
        Task::Idle
    }

    fn device_access(&self, index: usize, address: VirtAddr, action: Action) -> Task {
        let task = Task::Access(address, action);
        for _ in 0..MAX_DEVICE_FAULTS {
            let Some(epoch) = self.device_attempt(index, address, action) else {
                return Task::Idle;
            };
            let Some(epoch) = epoch else { return task };
            let device = DeviceId::new(index);
            let answer = self.engine().device_fault(device, address, action.access());
            let mut guard = self.scene();
            let scene = &mut *guard;
            scene.report.device_faults += 1;
            scene.answers[index] = Some(answer);
            let flux = scene.oracle.flux_at(SpaceId::OWN, address);
            let changed = flux.is_some() || scene.epoch != epoch;
            let allows = |access| scene.oracle.allows(SpaceId::OWN, address, access);
            let right = match answer {
                Ok(Resolution::Mapped) => continue,
                Ok(Resolution::Retry) => return task,
                Err(DeviceFaultError::NotMapped { .. }) => changed || !allows(Access::Read),
                Err(DeviceFaultError::ReadOnly { .. }) => {
                    action.access() == Access::Write && (changed || !allows(Access::Write))
                }
                Err(DeviceFaultError::Unreachable { .. }) => {
                    scene.report.unreachable += 1;
                    true
                }
                Err(DeviceFaultError::DeviceLost) => {
                    self.devices[index].is_lost() || scene.oracle.is_lost(SpaceId::OWN, address)
                }
                Err(DeviceFaultError::ShuttingDown) if scene.fork_guard => return task,
                Err(_) => false,
            };
            if !right {
                scene.fail(format!(
                    "device {index}: {action:?} at {address}: the engine says {answer:?}"
                ));
            }
            return Task::Idle;
        }
        task
    }

    /// One attempt of a kernel. `None` when the access is over; else the epoch
    /// at which the device faulted, or nothing when it is to try again later.
    fn device_attempt(
        &self,
        index: usize,
        address: VirtAddr,
        action: Action,
    ) -> Option<Option<u64>> {
        let space = SpaceId::OWN;
        let offset = offset_of(address);
        let access = action.access();
        let mut guard = self.scene();
        let scene = &mut *guard;
        let flux = scene.oracle.flux_at(space, address);
        // What is mapped where something else is going: the device may still
        // see the old page, so the program does not launch yet.
        let replaced = scene.oracle.is_replaced(space, address);
        let arriving = flux == Some(Flux::Arriving);
        if arriving || replaced || (flux.is_some() && access == Access::Write) {
            return Some(None);
        }
        let mut seen = ZEROS;
        let attempt = self.devices[index].attempt(address, access, &mut |data| {
            action.apply(offset, data);
            seen = *data;
        });
        match attempt {
            Attempt::Done => {}
            Attempt::Faults => return Some(Some(scene.epoch)),
            Attempt::Stopped => return Some(None),
            Attempt::Poisoned => {
                if !scene.oracle.is_lost(space, address) {
                    scene.fail(format!(
                        "device {index}: {action:?} at {address} is a SIGBUS"
                    ));
                }
                return None;
            }
        }
        scene.report.device_accesses += 1;
        if scene.oracle.page(space, address).is_none() {
            if flux.is_none() {
                scene.fail(format!(
                    "device {index}: {action:?} at {address}: nothing is mapped there any more"
                ));
            }
            return None;
        }
        // Permissions may have changed since the page was mapped: mprotect
        // tells nobody, so the device may still do what it was allowed to.
        if let Action::Load(len) = action {
            let seen = &seen[offset..offset + len];
            if let Err(message) = scene.oracle.read(space, address, offset, seen) {
                scene.fail(format!("device {index}: {message}"));
            }
        } else {
            let edit = |data: &mut Payload| action.apply(offset, data);
            scene.oracle.write(space, address, true, edit);
        }
        None
    }

    pub(crate) fn fork_returned(&self, child: SpaceId) {
        let mut scene = self.scene();
        scene.oracle.fork_returned(child);
        let number = scene.next_thread;
        scene.next_thread += 1;
        scene.actors.push(Actor {
            kind: Kind::Thread {
                space: child,
                number,
            },
            task: Task::Idle,
        });
    }

    /// MADV_DONTNEED, mapping by mapping: event, zap, next.
    fn discard(&self, space: SpaceId, piece: Option<Piece>, rest: Option<PageRange>) -> Task {
        if let Some(piece) = piece {
            if piece
                .ticket
                .is_some_and(|ticket| self.space.is_unread(ticket))
            {
                return Task::Discard(Some(piece), rest);
            }
            self.zap(space, piece.range);
            self.scene().oracle.settle(piece.change);
        }
        let Some(range) = rest else { return Task::Idle };
        let Some((part, ticket)) = self.space.dontneed(space, range) else {
            return Task::Idle;
        };
        let rest = (part.end() < range.end()).then(|| PageRange::span(part.end(), range.end()));
        if ticket.is_none() {
            // Nobody is told, so the kernel does not let go of its lock.
            self.zap(space, part);
            return Task::Discard(None, rest);
        }
        let change = self.scene().oracle.begin(space, part, Flux::Fading);
        let piece = Piece {
            range: part,
            ticket,
            change,
        };
        Task::Discard(Some(piece), rest)
    }

    fn zap(&self, space: SpaceId, range: PageRange) {
        self.orphan_pins(range, space);
        // A hole since the event was read: a device may have fetched it since, as
        // zeros, and have got lost. The drop does not bring it back.
        let lost: Vec<_> = range
            .iter_pages()
            .filter(|&page| {
                self.scene().oracle.is_lost(space, page) && self.space.may_be_away(space, page)
            })
            .collect();
        self.space.zap(space, range);
        let mut scene = self.scene();
        scene.oracle.zero(space, range);
        for page in lost {
            scene.oracle.forget_page(space, page);
        }
    }

    fn touch_pages(&self, thread: u32, range: PageRange, next: u64, why: Touching) -> Task {
        let page = range.start().plus_pages(next);
        let space = SpaceId::OWN;
        let mut guard = self.scene();
        let scene = &mut *guard;
        if scene.oracle.flux_at(space, page).is_some() {
            return Task::Touch(range, next, why);
        }
        let writable = scene.oracle.allows(space, page, Access::Write);
        let access = if writable {
            Access::Write
        } else {
            Access::Read
        };
        match self.space.touch(space, thread, page, access, &mut |_| {}) {
            Touch::Stopped => {
                scene.report.stops += 1;
                return Task::Touch(range, next, why);
            }
            Touch::Done if why == Touching::Pin && writable => {
                if let Some(pin) = self.space.pin(page) {
                    scene.pins.push(Pinned {
                        pin,
                        page,
                        orphan: false,
                    });
                }
            }
            Touch::Done | Touch::Segv | Touch::Sigbus => {}
        }
        if next + 1 < range.pages().get() {
            Task::Touch(range, next + 1, why)
        } else {
            Task::Idle
        }
    }
}
