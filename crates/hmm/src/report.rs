//! What a request did.

use std::collections::BTreeMap;
use std::fmt;

use hmm_types::{PageCount, PageRange, StayReason};

/// A range that stayed where it was, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StayedRange {
    /// The pages.
    pub range: PageRange,
    /// What stood in the way; see [`StayReason::advice`].
    pub reason: StayReason,
}

/// What a migration did: every page of the request is counted once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
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
    /// Which and why; at most 4096 ranges.
    pub stayed: Vec<StayedRange>,
    /// True when more ranges stayed than are listed.
    pub truncated: bool,
}

impl Report {
    /// Adds what the next part of the request did.
    pub(crate) fn add(&mut self, part: &hmm_core::MigrationReport) {
        self.moved += part.moved;
        self.already += part.already;
        self.zeroed += part.zeroed;
        self.huge += part.huge;
        self.stayed_pages += part.stayed_pages;
        self.truncated |= part.truncated;
        for stayed in &part.stayed {
            if let Some(last) = self.stayed.last_mut()
                && last.reason == stayed.reason
                && last.range.end() == stayed.range.start()
            {
                last.range = PageRange::span(last.range.start(), stayed.range.end());
            } else if self.stayed.len() < hmm_core::MigrationReport::MAX_STAYED {
                self.stayed.push(StayedRange {
                    range: stayed.range,
                    reason: stayed.reason,
                });
            } else {
                self.truncated = true;
            }
        }
    }

    /// All pages of the request.
    #[must_use]
    pub fn total(&self) -> PageCount {
        self.moved.plus(self.already).plus(self.stayed_pages)
    }

    /// Whether all pages are at the destination.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.stayed_pages == PageCount::ZERO
    }

    /// Pages that stayed, by reason.
    #[must_use]
    pub fn by_reason(&self) -> BTreeMap<String, PageCount> {
        let mut sums = BTreeMap::new();
        for stayed in &self.stayed {
            *sums
                .entry(stayed.reason.to_string())
                .or_insert(PageCount::ZERO) += stayed.range.pages();
        }
        sums
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} pages moved ({})",
            self.moved,
            self.total(),
            self.moved.bytes()
        )?;
        if self.already > PageCount::ZERO {
            write!(f, ", {} were there already", self.already)?;
        }
        if !self.is_complete() {
            write!(f, ", {} stayed:", self.stayed_pages)?;
            for (reason, pages) in self.by_reason() {
                write!(f, " {pages} {reason};")?;
            }
        }
        Ok(())
    }
}
