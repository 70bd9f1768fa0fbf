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
    pub(crate) fn of(report: &hmm_core::MigrationReport) -> Self {
        Self {
            moved: report.moved,
            already: report.already,
            zeroed: report.zeroed,
            huge: report.huge,
            stayed_pages: report.stayed_pages,
            stayed: report
                .stayed
                .iter()
                .map(|stayed| StayedRange {
                    range: stayed.range,
                    reason: stayed.reason,
                })
                .collect(),
            truncated: report.truncated,
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
