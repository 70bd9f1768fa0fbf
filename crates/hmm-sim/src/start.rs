//! How operations begin.

use hmm_hal::SpaceId;
use hmm_types::{DeviceId, MemoryKind, PageCount, PageRange};

use crate::actor::{Kind, Task, Then, Touching};
use crate::calls::MapRequest;
use crate::engine::EngineUnderTest;
use crate::oracle::Flux;
use crate::program::Op;
use crate::queue::Ticket;
use crate::world::World;

impl<E: EngineUnderTest> World<E> {
    /// Begins an operation; says what the actor is doing then.
    pub(crate) fn start(&self, kind: Kind, op: Op) -> Task {
        let space = match kind {
            Kind::Thread { space, .. } => space,
            Kind::Device(_) => SpaceId::OWN,
        };
        match op {
            Op::Idle => Task::Idle,
            Op::Access(address, action) => {
                if let Kind::Device(index) = kind {
                    self.engine().command_begins(DeviceId::new(index));
                    let mut scene = self.scene();
                    scene.begun[index] = scene.epoch;
                }
                Task::Access(address, action)
            }
            Op::Map(MapRequest { range, .. }) | Op::MapOver(range) | Op::Remap(_, range)
                if self.space.is_dropping(range) =>
            {
                Task::Idle
            }
            Op::Map(request) => {
                self.space.mmap(request);
                let mut scene = self.scene();
                scene.epoch += 1;
                let MapRequest { kind, page_len, .. } = request;
                scene.oracle.map(request.range, kind, page_len);
                Task::Idle
            }
            Op::Unmap(range) => {
                self.orphan_pins(range, space);
                let ticket = self.space.munmap(space, range);
                self.scene().oracle.unmap(space, range);
                self.wait(ticket, space, range, Flux::Gone)
            }
            Op::MapOver(range) => {
                self.orphan_pins(range, space);
                let ticket = self.space.map_over(range);
                {
                    let mut scene = self.scene();
                    scene.oracle.unmap(space, range);
                    let kind = MemoryKind::PrivateAnonymous;
                    scene.oracle.map(range, kind, PageCount::ONE);
                }
                self.wait(ticket, space, range, Flux::Arriving)
            }
            Op::Remap(from, to) => self.remap(from, to),
            Op::DontNeed(range) => Task::Discard(None, Some(range)),
            Op::AdviseFork(range, advice) => {
                self.space.advise_fork(range, advice);
                self.scene().oracle.advise_fork(range, advice);
                Task::Idle
            }
            Op::Protect(range, permissions) => {
                if !permissions.write {
                    // Such pages leave by copy and drop, which sees no pins.
                    self.orphan_pins(range, space);
                }
                self.space.mprotect(range, permissions);
                let mut scene = self.scene();
                scene.epoch += 1;
                scene
                    .oracle
                    .change(range, |page| page.permissions = permissions);
                Task::Idle
            }
            Op::Lock(range) => {
                self.space.mlock(range, true);
                Task::Touch(range, 0, Touching::Lock)
            }
            Op::Unlock(range) => {
                self.space.mlock(range, false);
                Task::Idle
            }
            Op::Pin(range) => Task::Touch(range, 0, Touching::Pin),
            Op::Dma(value) => self.dma(value),
            Op::Unpin => {
                let first = {
                    let mut scene = self.scene();
                    (!scene.pins.is_empty()).then(|| scene.pins.remove(0))
                };
                if let Some(pinned) = first {
                    self.space.unpin(pinned.pin);
                }
                Task::Idle
            }
            Op::Fork => self.fork(),
            Op::Exit => {
                self.space.exit(space);
                let mut scene = self.scene();
                scene.oracle.exit(space);
                Task::Gone
            }
            Op::Request(request) => {
                self.engine().request(request);
                Task::Idle
            }
            Op::LoseDevice(device) => self.lose(device),
        }
    }

    /// What an operation waits for, if anything.
    fn wait(&self, ticket: Option<Ticket>, space: SpaceId, range: PageRange, flux: Flux) -> Task {
        let mut scene = self.scene();
        scene.epoch += 1;
        match ticket {
            None => Task::Idle,
            Some(ticket) => {
                let change = scene.oracle.begin(space, range, flux);
                Task::Wait(ticket, Then::Settle(change))
            }
        }
    }

    fn remap(&self, from: PageRange, to: PageRange) -> Task {
        let Ok(ticket) = self.space.mremap(from, to) else {
            return Task::Idle;
        };
        let mut guard = self.scene();
        let scene = &mut *guard;
        scene.epoch += 1;
        for pinned in &mut scene.pins {
            if !pinned.orphan && from.contains(pinned.page) {
                let index = pinned.page.pages_since(from.start());
                pinned.orphan = index >= to.pages().get();
                pinned.page = to.start().plus_pages(index);
            }
        }
        scene.oracle.remap(from, to);
        match ticket {
            None => Task::Idle,
            Some(ticket) if from.start() == to.start() => {
                let tail = PageRange::span(to.end(), from.end());
                let gone = scene.oracle.begin(SpaceId::OWN, tail, Flux::Gone);
                Task::Wait(ticket, Then::Settle(gone))
            }
            Some(ticket) => {
                let gone = scene.oracle.begin(SpaceId::OWN, from, Flux::Gone);
                let arriving = scene.oracle.begin(SpaceId::OWN, to, Flux::Arriving);
                Task::Wait(ticket, Then::SettleBoth(gone, arriving))
            }
        }
    }

    fn fork(&self) -> Task {
        let reported = self.config.capabilities.fork_events;
        if !reported {
            // Waits for what is in flight: not where that is further up.
            if self.space.depth() > 0 {
                return Task::Idle;
            }
            self.scene().fork_guard = true;
            self.engine().before_fork();
        }
        let (child, ticket) = self.space.fork();
        {
            let mut scene = self.scene();
            scene.report.forks += 1;
            scene.oracle.fork(child);
        }
        if !reported {
            self.engine().after_fork();
            self.scene().fork_guard = false;
        }
        match ticket {
            Some(ticket) => Task::Wait(ticket, Then::Fork(child)),
            None => {
                self.fork_returned(child);
                Task::Idle
            }
        }
    }

    fn dma(&self, value: u8) -> Task {
        let mut guard = self.scene();
        let scene = &mut *guard;
        let Some(&pinned) = scene.pins.first() else {
            return Task::Idle;
        };
        // An orphan's page is unmapped, or may be on its way by copying, which
        // sees no pins: what it receives is lost.
        if pinned.orphan || scene.oracle.flux_at(SpaceId::OWN, pinned.page).is_some() {
            return Task::Idle;
        }
        let offset = scene.rng.index(crate::SIM_PAGE_BYTES);
        let edit = |data: &mut crate::Payload| data[offset] = value;
        match self.space.dma(pinned.pin, &mut { edit }) {
            Some(page) => scene.oracle.write(SpaceId::OWN, page, false, edit),
            None => scene.fail(format!("the pinned page {} is gone", pinned.page)),
        }
        Task::Idle
    }

    fn lose(&self, device: DeviceId) -> Task {
        self.devices[device.index()].lose();
        let mut scene = self.scene();
        scene.report.losses += 1;
        for space in scene.oracle.spaces() {
            let holes: Vec<_> = scene
                .oracle
                .space(space)
                .into_iter()
                .flat_map(|pages| pages.keys().copied())
                .filter(|&page| self.space.may_be_away(space, page))
                .collect();
            for page in holes {
                scene.oracle.forget_page(space, page);
            }
        }
        Task::Idle
    }

    pub(crate) fn orphan_pins(&self, range: PageRange, space: SpaceId) {
        if space == SpaceId::OWN {
            for pinned in &mut self.scene().pins {
                pinned.orphan |= range.contains(pinned.page);
            }
        }
    }
}
