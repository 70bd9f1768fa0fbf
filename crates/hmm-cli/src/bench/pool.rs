//! Huge pages of the kernel's pool, for as long as a measurement takes.

use hmm::ByteCount;

/// Bytes of a page.
const HUGE_PAGE: u64 = 2 << 20;
const SETTING: &str = "/proc/sys/vm/nr_hugepages";

/// Pages that were added to the pool; taken out again at the end.
#[derive(Debug)]
pub struct Pool {
    before: Option<u64>,
}

impl Pool {
    /// Makes sure that `size` of huge pages of 2 MiB are free. Else says why not,
    /// and what to do.
    pub fn of(size: ByteCount) -> Result<Self, String> {
        let pages = size.get() / HUGE_PAGE;
        let free = free_pages();
        if free >= pages {
            return Ok(Self { before: None });
        }
        let help = format!(
            "{pages} huge pages of 2 MiB are needed, {free} are free: as root, \
             `echo {pages} > {SETTING}`"
        );
        let total: u64 = std::fs::read_to_string(SETTING)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .ok_or_else(|| help.clone())?;
        std::fs::write(SETTING, (total + pages - free).to_string()).map_err(|_| help.clone())?;
        let pool = Self {
            before: Some(total),
        };
        if free_pages() < pages {
            return Err(help);
        }
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = std::fs::write(SETTING, before.to_string());
        }
    }
}

fn free_pages() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let number = |key: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(key))?;
        line.split_ascii_whitespace().nth(1)?.parse().ok()
    };
    let two_megabytes = number("Hugepagesize:") == Some(HUGE_PAGE >> 10);
    let free = number("HugePages_Free:").unwrap_or(0);
    let promised = number("HugePages_Rsvd:").unwrap_or(0);
    if two_megabytes {
        free.saturating_sub(promised)
    } else {
        0
    }
}
