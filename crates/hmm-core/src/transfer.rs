//! From device to device; and within one, to un-share a frame that a forked
//! child still needs as it is.

use std::sync::atomic::Ordering::Relaxed;

use hmm_hal::{DeviceError, Transfer};
use hmm_types::{DeviceId, FrameId, FrameRange, PageRange, StayReason};

use crate::engine::Engine;
use crate::executor::{BOUNCE_LEN, BOUNCE_PAGES, Executor};
use crate::home::run_transfers;
use crate::page::PageState;
use crate::staging::PageSet;
use crate::upload::{Fate, Flight, Passed, Target};

impl Engine<'_> {
    /// One step with the first pages of `range`, which rest on `from`.
    pub(crate) fn step_between_devices(
        &self,
        executor: &mut Executor,
        range: PageRange,
        from: DeviceId,
        target: Target,
    ) -> Passed {
        let slot = self.devices.slot(target.device);
        let want = range.pages().get().min(BOUNCE_PAGES);
        let frames = match slot.device.allocate_for(range.slice(0, want)) {
            Ok(frames) => frames,
            Err(DeviceError::OutOfMemory) => {
                return Passed::new(1, Fate::Stayed(StayReason::NoDeviceMemory));
            }
            Err(_) => return Passed::new(want, Fate::Stayed(StayReason::DeviceLost)),
        };
        let mut sources = [FrameId::new(0); BOUNCE_LEN];
        let Some(flight) = self.claim_transfer(range, from, target.device, frames, &mut sources)
        else {
            slot.device.free(frames);
            return Passed::new(1, Fate::Busy);
        };
        if flight.pages < frames.count() {
            slot.device
                .free(frames.slice(flight.pages, frames.count() - flight.pages));
        }
        let frames = frames.slice(0, flight.pages);
        let sources = &sources[..flight.pages as usize];
        let passed = match self.copy_between(executor, from, sources, target.device, frames) {
            Ok(()) => {
                let passed = self.commit_out(&flight, frames, target, false);
                for &frame in sources {
                    self.devices.slot(from).free(FrameRange::new(frame, 1));
                }
                self.stats
                    .pages_between_devices
                    .fetch_add(u64::from(flight.pages), Relaxed);
                passed
            }
            Err(error) => {
                slot.device.free(frames);
                self.settle_transfer(&flight, from, sources);
                self.stats.copy_failures.fetch_add(1, Relaxed);
                Passed::new(
                    u64::from(flight.pages),
                    Fate::Stayed(match error {
                        DeviceError::Lost => StayReason::DeviceLost,
                        _ => StayReason::CopyFailed,
                    }),
                )
            }
        };
        self.transition_ended();
        passed
    }

    fn claim_transfer(
        &self,
        range: PageRange,
        from: DeviceId,
        to: DeviceId,
        frames: FrameRange,
        sources: &mut [FrameId],
    ) -> Option<Flight> {
        let map = self.gate.read();
        let piece = map.find(range.start())?;
        // All of it is on one device, whatever it was taken for.
        let block = map.block(piece.block);
        if block.is_gigantic() || block.is_hugetlb() && from != to {
            return None;
        }
        let mut inner = map.block(piece.block).lock();
        let inner = &mut *inner;
        let most = u64::from(piece.pages.min(frames.count())).min(range.pages().get());
        let mut flight = Flight {
            block: piece.block,
            first: piece.first,
            pages: 0,
            present: PageSet::EMPTY,
            source: None,
        };
        while u64::from(flight.pages) < most {
            let PageState::Device { device, frame } = inner.state(piece.first + flight.pages)
            else {
                break;
            };
            if device != from {
                break;
            }
            sources[flight.pages as usize] = frame;
            flight.present.insert(flight.pages as usize);
            flight.pages += 1;
        }
        if flight.pages == 0 {
            return None;
        }
        let place = piece.range().slice(0, u64::from(flight.pages));
        self.invalidate(inner, place);
        for (index, &frame) in (piece.first..).zip(sources[..flight.pages as usize].iter()) {
            inner.set(
                index,
                PageState::Transferring {
                    device: from,
                    frame,
                },
            );
        }
        Some(flight)
    }

    fn copy_between(
        &self,
        executor: &Executor,
        from: DeviceId,
        sources: &[FrameId],
        to: DeviceId,
        frames: FrameRange,
    ) -> Result<(), DeviceError> {
        hmm_sync::assert_none_held();
        let bounce = executor.bounce(u64::from(frames.count()));
        let host = |page: usize| bounce.start().plus_pages(page as u64);
        let out = sources
            .iter()
            .enumerate()
            .map(|(page, &frame)| Transfer::ToHost {
                frames: FrameRange::new(frame, 1),
                host: host(page),
            });
        run_transfers(self.devices.slot(from).device, out)?;
        let into = std::iter::once(Transfer::ToDevice {
            host: bounce.start(),
            frames,
        });
        run_transfers(self.devices.slot(to).device, into)
    }

    /// The copy failed: the pages rest where they were.
    fn settle_transfer(&self, flight: &Flight, from: DeviceId, sources: &[FrameId]) {
        let map = self.gate.read();
        let block = map.block(flight.block);
        let mut inner = block.lock();
        for (index, &frame) in (flight.first..).zip(sources) {
            let entry = inner.entry(index);
            if entry.doomed() {
                self.devices.slot(from).free(FrameRange::new(frame, 1));
                inner.set(index, Self::after_removal(block, index));
            } else {
                inner.set(
                    index,
                    PageState::Device {
                        device: from,
                        frame,
                    },
                );
            }
            if entry.parked() {
                self.wake_pages(block, index, 1);
            }
        }
        inner.tidy();
    }
}
