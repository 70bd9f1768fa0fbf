//! What a run looks like: all of it follows from the seed.

use hmm_core::Settings;
use hmm_hal::Capabilities;
use hmm_types::{PAGES_PER_BLOCK, PageCount};

use crate::rng::SimRng;

/// How often something goes wrong: once in so many calls; 0 is never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// A storm of `Stop::Again`, a few calls long.
    pub again: u64,
    /// `Stop::Busy` for a page that nobody pinned.
    pub busy: u64,
    /// `Stop::NoMemory` when a page is copied.
    pub copy_no_memory: u64,
    /// `RegisterError::Limit`.
    pub register_limit: u64,
    /// Staging memory cannot be filled.
    pub provision_fails: u64,
    /// A device says that it is full.
    pub device_full: u64,
    /// Transfers are refused.
    pub submit_fails: u64,
    /// A transfer scrambles its destination.
    pub copy_fails: u64,
    /// A mapping in a device's page table fails.
    pub map_fails: u64,
}

/// One run of the simulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimConfig {
    /// Everything random follows from it.
    pub seed: u64,
    /// Operations that the program starts.
    pub ops: u64,
    /// What the simulated kernel can do.
    pub capabilities: Capabilities,
    /// Whether it can poison pages (Linux 6.6).
    pub poison: bool,
    /// Threads of the program.
    pub threads: u32,
    /// Devices.
    pub devices: usize,
    /// Whether the last device's memory is the CPU's as well.
    pub coherent: bool,
    /// Frames of each device.
    pub frames: u32,
    /// Staging slots of small pages.
    pub small_slots: u64,
    /// Staging slots of huge pages.
    pub huge_slots: u64,
    /// What goes wrong how often.
    pub rates: Rates,
    /// Hooks nest at most so deeply with other actors in them.
    pub nesting: u32,
    /// A hook lets an actor run once in so many times.
    pub interleave: u64,
    /// Whether a fork obeys MADV_DONTFORK and MADV_WIPEONFORK and the program
    /// uses them: the engine has no way yet to learn of these flags.
    pub fork_flags: bool,
    /// Whether devices get lost.
    pub lose_devices: bool,
    /// Whether requests may name ranges that another thread is remapping.
    pub racy_requests: bool,
    /// Whether threads change mappings all the time, and those of others that
    /// they have come by.
    pub restless: bool,
    /// Whether the program has pages of hugetlbfs.
    pub huge_pages: bool,
    /// How much one page of hugetlbfs of several blocks is, if there are such.
    pub gigantic: Option<PageCount>,
    /// Whether the CPU can read the memory of devices.
    pub host_view: bool,
    /// What the engine is opened with.
    pub settings: Settings,
}

impl SimConfig {
    /// The run that belongs to a seed.
    #[must_use]
    pub fn from_seed(seed: u64, ops: u64) -> Self {
        let config = Self::without_gigantic(seed, ops);
        // Drawn by itself, so that it changes nothing else of a seed.
        if config.huge_pages && SimRng::new(seed, 9).one_in(2) {
            config.with_gigantic()
        } else {
            config
        }
    }

    /// The same run with pages of hugetlbfs of several blocks, and with devices that
    /// hold some.
    #[must_use]
    pub fn with_gigantic(self) -> Self {
        if self.gigantic.is_some() {
            return self;
        }
        let blocks = 1 << SimRng::new(self.seed, 10).between(1, 2);
        Self {
            huge_pages: true,
            gigantic: Some(PageCount::from(PAGES_PER_BLOCK * blocks)),
            frames: self.frames * if self.frames >= 256 { 4 } else { 1 },
            ..self
        }
    }

    fn without_gigantic(seed: u64, ops: u64) -> Self {
        let mut rng = SimRng::new(seed, 1);
        let move_pages = !rng.one_in(4);
        let faulty = !rng.one_in(3);
        let rate = |rng: &mut SimRng, most: u64| {
            if faulty && !rng.one_in(3) {
                rng.between(8, most)
            } else {
                0
            }
        };
        let poison = !rng.one_in(4);
        Self {
            seed,
            ops,
            capabilities: Capabilities {
                move_pages,
                fork_events: !rng.one_in(8),
                kernel_faults: true,
                write_protect: !move_pages || !rng.one_in(8),
                tells_guards: true,
                poison: true,
            },
            poison,
            threads: u32::try_from(rng.between(1, 3)).unwrap_or(1),
            devices: 1 + rng.index(2),
            coherent: false,
            frames: u32::try_from(if rng.one_in(3) {
                rng.between(8, 64)
            } else {
                rng.between(256, 2048)
            })
            .unwrap_or(8),
            small_slots: rng.between(2, 4),
            huge_slots: rng.below(3),
            rates: Rates {
                again: rate(&mut rng, 60),
                busy: rate(&mut rng, 200),
                copy_no_memory: rate(&mut rng, 100),
                register_limit: rate(&mut rng, 20),
                provision_fails: rate(&mut rng, 20),
                device_full: rate(&mut rng, 40),
                submit_fails: rate(&mut rng, 80),
                copy_fails: rate(&mut rng, 80),
                map_fails: rate(&mut rng, 80),
            },
            nesting: u32::try_from(rng.below(4)).unwrap_or(0),
            interleave: rng.between(1, 4),
            fork_flags: false,
            // Without poison the engine has to end the process.
            lose_devices: faulty && poison && rng.one_in(4),
            racy_requests: false,
            restless: rng.one_in(6),
            // Drawn by itself, so that it changes nothing else of a seed.
            huge_pages: SimRng::new(seed, 7).one_in(4),
            gigantic: None,
            host_view: SimRng::new(seed, 8).one_in(2),
            settings: Settings {
                fault_granule: PageCount::new(1 << rng.below(6)),
                device_granule: PageCount::new(1 << rng.below(8)),
                readahead: rng.one_in(2),
                staging_limit: PageCount::new(rng.below(1024)).bytes(),
                copy_at_most: PageCount::new(rng.below(9)),
                reuse_pages: !rng.one_in(4),
            },
        }
    }
}
