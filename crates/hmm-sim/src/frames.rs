//! A simulated device's memory.

use hmm_types::{FrameId, FrameRange, PageCount};

use crate::page::{Payload, SIM_PAGE_BYTES};
use crate::rng::SimRng;

#[derive(Clone, Copy, Debug)]
struct Frame {
    data: Payload,
    used: bool,
    /// Entries of the page table that lead here.
    mapped: u32,
}

/// Frames, with what they hold. A fresh frame holds garbage.
#[derive(Debug)]
pub(crate) struct Frames {
    frames: Vec<Frame>,
    free: u32,
}

impl Frames {
    pub(crate) fn new(count: u32) -> Self {
        let frame = Frame {
            data: [0xee; SIM_PAGE_BYTES],
            used: false,
            mapped: 0,
        };
        Self {
            frames: vec![frame; count as usize],
            free: count,
        }
    }

    pub(crate) fn free_pages(&self) -> PageCount {
        PageCount::new(u64::from(self.free))
    }

    /// A run of at most `pages` frames: first fit, sometimes shorter.
    pub(crate) fn allocate(&mut self, rng: &mut SimRng, pages: PageCount) -> Option<FrameRange> {
        let first = self.frames.iter().position(|frame| !frame.used)?;
        let mut wanted = pages.index();
        if rng.one_in(4) {
            wanted = 1 + rng.index(wanted);
        }
        let run = self.frames[first..]
            .iter()
            .take(wanted)
            .take_while(|frame| !frame.used)
            .count();
        let run = FrameRange::new(
            FrameId::new(u32::try_from(first).ok()?),
            u32::try_from(run).ok()?,
        );
        for frame in run.iter() {
            let garbage = (rng.bits() & 0xff) as u8;
            self.frames[frame.index()] = Frame {
                data: [garbage; SIM_PAGE_BYTES],
                used: true,
                mapped: 0,
            };
        }
        self.free -= run.count();
        Some(run)
    }

    pub(crate) fn free(&mut self, run: FrameRange) {
        for id in run.iter() {
            let frame = &mut self.frames[id.index()];
            assert!(frame.used, "{id:?} is freed twice");
            assert!(frame.mapped == 0, "{id:?} is freed while it is mapped");
            frame.used = false;
        }
        self.free += run.count();
    }

    pub(crate) fn data(&mut self, id: FrameId) -> &mut Payload {
        let frame = &mut self.frames[id.index()];
        assert!(frame.used, "{id:?} is used but not allocated");
        &mut frame.data
    }

    pub(crate) fn check_used(&self, run: FrameRange) {
        for id in run.iter() {
            assert!(
                self.frames[id.index()].used,
                "{id:?} is used but not allocated"
            );
        }
    }

    pub(crate) fn count_mapping(&mut self, id: FrameId, more: bool) {
        let frame = &mut self.frames[id.index()];
        assert!(frame.used, "{id:?} is mapped but not allocated");
        if more {
            frame.mapped += 1;
        } else {
            frame.mapped -= 1;
        }
    }

    pub(crate) fn is_mapped(&self, id: FrameId) -> bool {
        self.frames[id.index()].mapped > 0
    }

    pub(crate) fn used(&self) -> Vec<FrameId> {
        (0..)
            .zip(&self.frames)
            .filter(|(_, frame)| frame.used)
            .map(|(number, _)| FrameId::new(number))
            .collect()
    }
}
