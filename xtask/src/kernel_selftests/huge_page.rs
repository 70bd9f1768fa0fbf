//! A huge page for the tests that want one, while they run.

use std::fs;

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// How many huge pages there were; so many there are again when this is
/// dropped. Newer tests care for that themselves, but not when they are killed.
/// When this program is killed, the page stays.
#[derive(Debug)]
pub struct HugePage(Option<u64>);

impl HugePage {
    /// Makes sure that one is free. Where that cannot be done, the tests that
    /// want one skip themselves.
    pub fn provide() -> Self {
        let before = read(COUNT).and_then(|text| text.trim().parse().ok());
        let free = read("/proc/meminfo").and_then(|text| free(&text));
        if let (Some(before), Some(0)) = (before, free) {
            let _ = fs::write(COUNT, format!("{}", before + 1));
        }
        Self(before)
    }
}

impl Drop for HugePage {
    fn drop(&mut self) {
        let now = read(COUNT).and_then(|text| text.trim().parse::<u64>().ok());
        if let Some(before) = self.0
            && now != self.0
        {
            let _ = fs::write(COUNT, before.to_string());
        }
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn free(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Free:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_pages_in_meminfo() {
        let text = "HugePages_Total:       3\nHugePages_Free:        2\n";
        assert_eq!(free(text), Some(2));
        assert_eq!(free("MemTotal: 1 kB\n"), None);
    }
}
