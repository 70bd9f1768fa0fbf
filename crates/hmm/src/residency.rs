//! What is where, as a map that a person can read.

use std::fmt;

use hmm_types::{DeviceId, MAX_DEVICES, PageCount, PageRange, PageResidency};

/// Where the pages of a range are, at one moment.
///
/// Displayed as a map: `.` is system memory, `0` to `9` and `a` to `f` the
/// device of that number, `x` exclusive, `~` on its way, and `+` a cell in which
/// places mix. Each cell stands for the same number of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residency {
    range: PageRange,
    pages: Vec<PageResidency>,
}

impl Residency {
    /// Cells in a line of the map, and the most lines that it has.
    const WIDTH: usize = 64;
    const LINES: usize = 16;

    pub(crate) fn new(range: PageRange, pages: Vec<PageResidency>) -> Self {
        Self { range, pages }
    }

    /// The range.
    #[must_use]
    pub const fn range(&self) -> PageRange {
        self.range
    }

    /// One entry for each page, in order.
    #[must_use]
    pub fn pages(&self) -> &[PageResidency] {
        &self.pages
    }

    /// Pages in a device's memory.
    #[must_use]
    pub fn on_device(&self, device: DeviceId) -> PageCount {
        self.count(PageResidency::Device(device))
            .plus(self.count(PageResidency::Coherent(device)))
    }

    /// Pages in system memory, or not there yet.
    #[must_use]
    pub fn in_system(&self) -> PageCount {
        self.count(PageResidency::System)
    }

    fn count(&self, wanted: PageResidency) -> PageCount {
        PageCount::from(self.pages.iter().filter(|&&page| page == wanted).count())
    }

    fn glyph(page: PageResidency) -> char {
        match page {
            PageResidency::System => '.',
            PageResidency::Device(device) | PageResidency::Coherent(device) => {
                debug_assert!(device.index() < MAX_DEVICES);
                char::from_digit(u32::try_from(device.index()).unwrap_or(0), 16).unwrap_or('?')
            }
            PageResidency::Exclusive(_) => 'x',
            _ => '~',
        }
    }

    /// The map's lines, each at most `width` cells.
    #[must_use]
    pub fn lines(&self, width: usize, most_lines: usize) -> Vec<String> {
        let cells = (width * most_lines).max(1);
        let each = self.pages.len().div_ceil(cells).max(1);
        let map: Vec<char> = self
            .pages
            .chunks(each)
            .map(|cell| {
                let first = Self::glyph(cell[0]);
                if cell.iter().all(|&page| Self::glyph(page) == first) {
                    first
                } else {
                    '+'
                }
            })
            .collect();
        map.chunks(width.max(1))
            .map(|line| line.iter().collect())
            .collect()
    }
}

impl fmt::Display for Residency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = self.pages.len().div_ceil(Self::WIDTH * Self::LINES).max(1);
        writeln!(
            f,
            "{} pages from {}, {} to a cell:",
            self.pages.len(),
            self.range.start(),
            PageCount::from(each).bytes()
        )?;
        for line in self.lines(Self::WIDTH, Self::LINES) {
            writeln!(f, "  {line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmm_types::VirtAddr;

    #[test]
    fn the_map_shows_where_pages_are() {
        let range = PageRange::new(VirtAddr::new(1 << 20), 8 * 4096).unwrap();
        let mut pages = vec![PageResidency::System; 8];
        pages[2] = PageResidency::Device(DeviceId::new(0));
        pages[3] = PageResidency::Device(DeviceId::new(11));
        pages[4] = PageResidency::InFlight;
        pages[5] = PageResidency::Exclusive(DeviceId::new(0));
        let residency = Residency::new(range, pages);
        assert_eq!(residency.lines(4, 2), ["..0b", "~x.."]);
        assert_eq!(residency.lines(4, 1), [".++."]);
        assert_eq!(residency.on_device(DeviceId::new(0)).get(), 1);
        assert_eq!(residency.in_system().get(), 4);
    }
}
