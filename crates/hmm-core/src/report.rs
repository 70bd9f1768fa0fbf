//! What a request did, page by page in total and range by range in what stayed.

use hmm_mem::Vec;
use hmm_types::{DeviceId, PageCount, PageRange, StayReason};

/// Where a migration takes pages to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A device's memory.
    Device(DeviceId),
    /// System memory: pages come home.
    System,
}

/// A range that stayed where it was, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stayed {
    /// The pages.
    pub range: PageRange,
    /// What stood in the way.
    pub reason: StayReason,
}

/// What a migration did: every page of the request is counted exactly once, as
/// moved, as already there, or in one of the ranges that stayed.
#[derive(Debug)]
pub struct MigrationReport {
    /// Pages that are at the destination now and were not before.
    pub moved: PageCount,
    /// Pages that were there already.
    pub already: PageCount,
    /// Of the moved ones: holes that became zeroed frames without a copy.
    pub zeroed: PageCount,
    /// Of the moved ones: pages that moved as part of a huge page.
    pub huge: PageCount,
    /// Pages that did not move.
    pub stayed_pages: PageCount,
    /// Where and why; neighbours with the same reason are one entry, in the
    /// order in which they were met.
    pub stayed: Vec<Stayed>,
    /// True when there were more entries than [`MigrationReport::MAX_STAYED`]:
    /// the pages of the others are counted, but not listed.
    pub truncated: bool,
}

impl MigrationReport {
    /// Ranges that a report lists.
    pub const MAX_STAYED: usize = 4096;

    pub(crate) const fn new() -> Self {
        Self {
            moved: PageCount::ZERO,
            already: PageCount::ZERO,
            zeroed: PageCount::ZERO,
            huge: PageCount::ZERO,
            stayed_pages: PageCount::ZERO,
            stayed: hmm_mem::vec(),
            truncated: false,
        }
    }

    /// All pages that the request named.
    #[must_use]
    pub fn total(&self) -> PageCount {
        self.moved.plus(self.already).plus(self.stayed_pages)
    }

    /// Whether all pages are at the destination.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.stayed_pages == PageCount::ZERO
    }

    pub(crate) fn stay(&mut self, range: PageRange, reason: StayReason) {
        self.stayed_pages += range.pages();
        if let Some(last) = self.stayed.last_mut()
            && last.reason == reason
            && last.range.end() == range.start()
        {
            last.range = PageRange::span(last.range.start(), range.end());
            return;
        }
        if self.stayed.len() == Self::MAX_STAYED {
            self.truncated = true;
            return;
        }
        self.stayed.push(Stayed { range, reason });
    }
}
