//! The rows: one table that names, lists, checks and documents them.

use serde::Serialize;

use super::sample::{Measured, Outcome};
use super::{chase, fault, metadata, stream, transfer, vulkan};

/// What is measured, and what it is to reach.
#[derive(Debug)]
pub struct Row {
    /// What to call it.
    pub name: &'static str,
    /// Unit of value and floor.
    pub unit: &'static str,
    /// What the ratio, or without a floor the value, must be.
    pub target: Target,
    /// What is compared with what.
    pub what: &'static str,
    pub(super) group: Group,
}

/// A bound on a ratio.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Good when no greater.
    AtMost(f64),
    /// Good when no less.
    AtLeast(f64),
}

/// Rows that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Fault,
    Transfer { huge: bool },
    Hugetlb,
    File,
    Scan,
    Disjoint,
    Stream,
    Chase,
    Metadata,
    VulkanContiguous,
    VulkanCold,
    VulkanChase,
    VulkanDispatches,
}

impl Group {
    /// Whether its rows are about a Vulkan device.
    pub(super) const fn is_vulkan(self) -> bool {
        matches!(
            self,
            Self::VulkanContiguous | Self::VulkanCold | Self::VulkanChase | Self::VulkanDispatches
        )
    }

    /// Measures all rows of the group.
    pub(super) fn measure(self) -> anyhow::Result<Outcome> {
        match self {
            Self::Fault => fault::latency(),
            Self::Transfer { huge } => transfer::both_ways(huge),
            Self::Hugetlb => transfer::hugetlb(),
            Self::File => stream::file(),
            Self::Scan => transfer::scan(),
            Self::Disjoint => fault::disjoint(),
            Self::Stream => stream::stream(),
            Self::Chase => chase::chase(),
            Self::Metadata => metadata::metadata(),
            Self::VulkanContiguous => vulkan::contiguous(),
            Self::VulkanCold => vulkan::cold(),
            Self::VulkanChase => vulkan::chase(),
            Self::VulkanDispatches => vulkan::dispatches(),
        }
    }
}

use Target::{AtLeast, AtMost};

/// All rows.
pub const ROWS: &[Row] = &[
    Row {
        name: "fault_4k_p50",
        unit: "us",
        target: AtMost(1.25),
        what: "CPU touch of a page on the device, median; floor: the barest handler",
        group: Group::Fault,
    },
    Row {
        name: "fault_4k_p99",
        unit: "us",
        target: AtMost(2.0),
        what: "the same, what 99 of 100 touches take at most",
        group: Group::Fault,
    },
    Row {
        name: "to_device_256m",
        unit: "GB/s",
        target: AtLeast(0.80),
        what: "one migrate call, 4 KiB pages; floor: memcpy by one thread",
        group: Group::Transfer { huge: false },
    },
    Row {
        name: "to_system_256m",
        unit: "GB/s",
        target: AtLeast(0.80),
        what: "one evict call, 4 KiB pages; floor: memcpy by one thread",
        group: Group::Transfer { huge: false },
    },
    Row {
        name: "to_device_256m_thp",
        unit: "GB/s",
        target: AtLeast(0.90),
        what: "one migrate call, huge pages; floor: memcpy by one thread",
        group: Group::Transfer { huge: true },
    },
    Row {
        name: "to_system_256m_thp",
        unit: "GB/s",
        target: AtLeast(0.90),
        what: "one evict call, huge pages; floor: memcpy by one thread",
        group: Group::Transfer { huge: true },
    },
    Row {
        name: "hugetlb_to_device",
        unit: "GB/s",
        target: AtLeast(0.80),
        what: "one migrate call, 256 MiB of hugetlbfs; floor: memcpy by one thread",
        group: Group::Hugetlb,
    },
    Row {
        name: "hugetlb_to_system",
        unit: "GB/s",
        target: AtLeast(0.80),
        what: "one evict call, 256 MiB of hugetlbfs; floor: memcpy by one thread",
        group: Group::Hugetlb,
    },
    Row {
        name: "mirror_file_read",
        unit: "GB/s",
        target: AtLeast(0.50),
        what: "a kernel reads a page-cached file of 256 MiB in place; floor: memcpy",
        group: Group::File,
    },
    Row {
        name: "scan_256m",
        unit: "GB/s",
        target: AtLeast(0.60),
        what: "CPU reads in sequence what is all on the device; floor: memcpy",
        group: Group::Scan,
    },
    Row {
        name: "fault_disjoint_2t",
        unit: "faults/s",
        target: AtLeast(1.6),
        what: "two threads fault in blocks of their own; floor: one thread",
        group: Group::Disjoint,
    },
    Row {
        name: "device_stream",
        unit: "GB/s",
        target: AtLeast(0.50),
        what: "a kernel reads device memory in sequence; floor: the CPU, directly",
        group: Group::Stream,
    },
    Row {
        name: "device_chase",
        unit: "ns/hop",
        target: AtLeast(0.50),
        what: "a kernel follows pointers on the device; floor: the CPU, directly \
               (ratio: floor / value)",
        group: Group::Chase,
    },
    Row {
        name: "metadata_idle",
        unit: "B/page",
        target: AtMost(1.0),
        what: "engine memory for each page that is registered and at home; no floor",
        group: Group::Metadata,
    },
    Row {
        name: "metadata_resident",
        unit: "B/page",
        target: AtMost(16.0),
        what: "engine memory for each page on the device; no floor",
        group: Group::Metadata,
    },
    Row {
        name: "vulkan_unchecked",
        unit: "ms",
        target: AtLeast(0.90),
        what: "a shader adds up what it has named, 255 MiB on the device (floor); value: \
               the same over the device's own addresses",
        group: Group::VulkanContiguous,
    },
    Row {
        name: "vulkan_checked",
        unit: "ms",
        target: AtMost(1.30),
        what: "the same with every access checked; floor: over the device's own addresses",
        group: Group::VulkanContiguous,
    },
    Row {
        name: "vulkan_checked_chase",
        unit: "ms",
        target: AtMost(1.20),
        what: "a shader follows 64 chains, checked; floor: over the device's own addresses",
        group: Group::VulkanChase,
    },
    Row {
        name: "vulkan_stream_cold",
        unit: "GB/s",
        target: AtLeast(0.50),
        what: "a shader reads 256 MiB that are at home, on demand; floor: memcpy",
        group: Group::VulkanCold,
    },
    Row {
        name: "vulkan_stream_named",
        unit: "GB/s",
        target: AtLeast(0.50),
        what: "the same with the memory named; floor: memcpy",
        group: Group::VulkanCold,
    },
    Row {
        name: "vulkan_chase_repeat",
        unit: "dispatches",
        target: AtMost(70.0),
        what: "64 chains of 4000 hops through 256 MiB at home, begun again; no floor",
        group: Group::VulkanDispatches,
    },
    Row {
        name: "vulkan_chase_wait",
        unit: "dispatches",
        target: AtMost(1.0),
        what: "the same, waiting for pages; no floor",
        group: Group::VulkanDispatches,
    },
];

/// One line of the JSON.
#[derive(Debug, Serialize)]
pub(super) struct RowResult<'a> {
    name: &'static str,
    value: Option<f64>,
    unit: &'static str,
    floor: Option<f64>,
    ratio: Option<f64>,
    target: f64,
    ok: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped: Option<&'a str>,
}

impl Row {
    /// What the target is about: the ratio, or the value where nothing can be
    /// compared with it.
    const fn judged(measured: Measured) -> f64 {
        match measured.ratio {
            Some(ratio) => ratio,
            None => measured.value,
        }
    }

    pub(super) fn is_ok(&self, measured: Measured) -> bool {
        match self.target {
            AtMost(most) => Self::judged(measured) <= most,
            AtLeast(least) => Self::judged(measured) >= least,
        }
    }

    pub(super) fn result(&self, measured: Measured) -> RowResult<'static> {
        let (AtMost(target) | AtLeast(target)) = self.target;
        RowResult {
            name: self.name,
            value: Some(rounded(measured.value)),
            unit: self.unit,
            floor: measured.floor.map(rounded),
            ratio: measured.ratio.map(rounded),
            target,
            ok: Some(self.is_ok(measured)),
            skipped: None,
        }
    }

    /// The line of a row that cannot be measured here.
    pub(super) const fn skipped<'a>(&self, why: &'a str) -> RowResult<'a> {
        let (AtMost(target) | AtLeast(target)) = self.target;
        RowResult {
            name: self.name,
            value: None,
            unit: self.unit,
            floor: None,
            ratio: None,
            target,
            ok: None,
            skipped: Some(why),
        }
    }

    pub(super) fn cells_skipped(&self, why: &str) -> [String; 7] {
        let none = || "-".to_owned();
        [
            self.name.to_owned(),
            none(),
            none(),
            none(),
            self.bound(),
            "SKIPPED".to_owned(),
            why.to_owned(),
        ]
    }

    fn bound(&self) -> String {
        match self.target {
            AtMost(most) => format!("<= {most:.2}"),
            AtLeast(least) => format!(">= {least:.2}"),
        }
    }

    pub(super) fn cells(&self, measured: Measured) -> [String; 7] {
        let number = |value: f64| {
            if value >= 1000.0 {
                format!("{value:.0}")
            } else {
                format!("{value:.2}")
            }
        };
        let maybe = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
        [
            self.name.to_owned(),
            format!("{} {}", number(measured.value), self.unit),
            maybe(measured.floor),
            maybe(measured.ratio),
            self.bound(),
            if self.is_ok(measured) { "ok" } else { "MISSED" }.to_owned(),
            self.what.to_owned(),
        ]
    }
}

/// Four digits behind the point are more than any of the clocks is good for.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_point_the_right_way() {
        let of = |ratio| Measured {
            value: 1.0,
            floor: Some(1.0),
            ratio: Some(ratio),
        };
        assert!(ROWS[0].is_ok(of(1.25)) && !ROWS[0].is_ok(of(1.26)));
        assert!(ROWS[2].is_ok(of(0.80)) && !ROWS[2].is_ok(of(0.79)));
    }
}
