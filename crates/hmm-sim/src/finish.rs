//! How a run ends: everything is looked at, by the processes and then, when
//! the engine is gone, behind their backs.

use hmm_hal::SpaceId;
use hmm_types::VirtAddr;

use crate::actor::{Kind, Task};
use crate::device::SimDevice;
use crate::engine::EngineUnderTest;
use crate::page::{SIM_PAGE_BYTES, ZEROS};
use crate::program::Action;
use crate::world::World;

/// Turns within which a page must be served.
const MAX_SERVE_STEPS: u32 = 2_000;
/// Thread number of the last reader.
const SWEEPER: u32 = 1 << 20;

impl<E: EngineUnderTest> World<E> {
    pub(crate) fn finish(&self) {
        let pins: Vec<_> = self.scene().pins.drain(..).collect();
        for pinned in pins {
            self.space.unpin(pinned.pin);
        }
        self.engine().check();
        if self.scene().rng.one_in(2) {
            self.sweep();
        }
        // What goes wrong now and then does not go wrong for ever.
        self.space.calm();
        self.devices.iter().for_each(SimDevice::calm);
        let clean = self.engine().shutdown();
        if !clean && !self.devices.iter().any(SimDevice::is_lost) {
            self.scene()
                .fail("the engine leaves something on a device that works".to_owned());
        }
        self.drain();
        self.look(clean);
        for (index, device) in self.devices.iter().enumerate() {
            if let (false, Err(message)) = (device.is_lost(), device.check_empty()) {
                self.scene().fail(format!("device {index}: {message}"));
            }
        }
    }

    fn pages(&self) -> Vec<(SpaceId, VirtAddr, bool)> {
        let scene = self.scene();
        let mut all = Vec::new();
        for space in scene.oracle.spaces() {
            for (&page, expected) in scene.oracle.space(space).into_iter().flatten() {
                all.push((space, page, expected.permissions.read));
            }
        }
        all
    }

    /// Every process reads every page.
    fn sweep(&self) {
        for (space, page, readable) in self.pages() {
            if readable && !self.failed() {
                self.sweep_page(space, page);
            }
        }
    }

    fn sweep_page(&self, space: SpaceId, page: VirtAddr) {
        let kind = Kind::Thread {
            space,
            number: SWEEPER,
        };
        let mut task = Task::Access(page, Action::Load(SIM_PAGE_BYTES));
        for _ in 0..MAX_SERVE_STEPS {
            task = self.advance(kind, task);
            if matches!(task, Task::Idle) {
                return;
            }
            self.engine().read();
            self.engine().work();
        }
        let waits = self.space.describe_waits();
        self.scene()
            .fail(format!("{space:?} waits for {page} for ever; {waits}"));
    }

    /// Looks at every page without touching it.
    fn look(&self, clean: bool) {
        for (space, page, _) in self.pages() {
            let data = self.space.peek(space, page).unwrap_or(ZEROS);
            let mut scene = self.scene();
            if let Err(message) = scene.oracle.read(space, page, 0, &data) {
                scene.fail(format!("after shutdown: {message}"));
            }
        }
        let spaces = self.scene().oracle.spaces();
        for space in spaces {
            if clean && self.space.is_watched(space) {
                self.scene().fail(format!(
                    "after shutdown: {space:?} is still registered: {:?}",
                    self.space.watched(space)
                ));
            }
        }
    }
}
