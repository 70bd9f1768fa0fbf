//! A small host for instrumented kernels: memory that kernels name by addresses
//! of their own, a page table, and the serving of faults.
#![allow(dead_code, reason = "each binary uses some of it")]
#![allow(unreachable_pub, reason = "one module in many binaries")]
#![allow(
    missing_docs,
    missing_debug_implementations,
    reason = "a test's own tools"
)]

pub mod vulkan;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hmm_spirv::{Options, Variant, control, instrument, table};
use vulkan::{Buffer, CONTROL, Gpu, Pipeline};

const PAGE: u64 = 4096;
const WIDE: u64 = 65536;

/// Says aloud that a test cannot run here.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        eprintln!("SKIPPED {}: {}", module_path!(), format_args!($($why)*));
        return;
    }};
}

/// A kernel of `tests/kernels`, or of the folder `HMM_SPIRV_KERNELS`: the same
/// kernels made by another compiler, say.
pub fn kernel(name: &str) -> Vec<u32> {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernels");
    let folder = std::env::var("HMM_SPIRV_KERNELS").unwrap_or_else(|_| own.to_owned());
    let path = format!("{folder}/{name}.spv");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    bytes
        .chunks_exact(4)
        .map(|it| u32::from_le_bytes([it[0], it[1], it[2], it[3]]))
        .collect()
}

/// How the host answers a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// Maps 4 KiB, to frames in no order; reads get read-only pages.
    Small,
    /// Maps 64 KiB that lie together.
    Large,
    /// The same for reading; single pages become writable, and their groups do not yet
    /// know.
    Torn,
}

/// What a launch took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub rounds: u32,
    pub faults: u64,
    pub evictions: u64,
    pub torn: u32,
    pub unfinished: u32,
}

/// The program's memory, and the device's view of it.
pub struct Host {
    pub gpu: Gpu,
    /// What the program has where, beginning at `base`.
    home: Vec<u8>,
    pub base: u64,
    next: u64,
    control: Buffer,
    root: Buffer,
    empty: Buffer,
    leaves: Vec<(u64, Buffer)>,
    log: Buffer,
    done: Buffer,
    frames: Buffer,
    /// Frame of each page of home; `None` if it is at home.
    placed: Vec<Option<u64>>,
    free: Vec<u64>,
    pub grain: Grain,
    /// Pages that have been asked for to be written, where the grain is `Torn`.
    pub asked: BTreeSet<u64>,
    pub log_capacity: u32,
    pub stall_polls: u32,
    /// Pages are taken away from a stalled kernel every so many polls of the host.
    pub evict: bool,
    /// Pretends that `stop` was set after so long.
    pub stop_after: Option<Duration>,
    /// Everything is taken away from a stalled kernel then, once.
    pub evict_after: Option<Duration>,
}

impl Host {
    /// Opens the device and gives the program `bytes` of memory at addresses
    /// from `base` on, which no one may touch untranslated.
    pub fn new(base: u64, bytes: u64) -> Result<Self, String> {
        let gpu = Gpu::open()?;
        let bytes = bytes.next_multiple_of(WIDE);
        let pages = usize::try_from(bytes / PAGE).expect("pages");
        let root = gpu.buffer(table::ROOT_SIZE);
        let empty = gpu.buffer(table::LEAF_SIZE);
        for index in 0..table::ROOT_ENTRIES {
            long(&root, index * 8).store(empty.address, Ordering::Relaxed);
        }
        let log = gpu.buffer(8 << 16);
        let frames = gpu.buffer(bytes + WIDE);
        let control = gpu.buffer(control::SIZE);
        let done = gpu.buffer(1 << 21);
        Ok(Self {
            gpu,
            home: vec![0; usize::try_from(bytes).expect("a size")],
            base,
            next: base,
            control,
            root,
            empty,
            leaves: Vec::new(),
            log,
            done,
            frames,
            placed: vec![None; pages],
            free: Vec::new(),
            grain: Grain::Large,
            asked: BTreeSet::new(),
            log_capacity: 1 << 12,
            stall_polls: 1 << 28,
            evict: false,
            stop_after: None,
            evict_after: None,
        })
    }

    /// Memory for the program: its address.
    pub fn allocate(&mut self, bytes: u64, align: u64) -> u64 {
        let at = self.next.next_multiple_of(align);
        self.next = at + bytes;
        assert!(
            self.next - self.base <= self.home.len() as u64,
            "no memory left"
        );
        at
    }

    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        let at = usize::try_from(address - self.base).expect("an offset");
        self.home[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn read(&self, address: u64, bytes: u64) -> &[u8] {
        let at = usize::try_from(address - self.base).expect("an offset");
        &self.home[at..at + usize::try_from(bytes).expect("a size")]
    }

    pub fn words(&self, address: u64, count: u64) -> Vec<u32> {
        let bytes = self.read(address, count * 4);
        bytes
            .chunks_exact(4)
            .map(|it| u32::from_le_bytes(it.try_into().expect("4")))
            .collect()
    }

    pub fn longs(&self, address: u64, count: u64) -> Vec<u64> {
        let bytes = self.read(address, count * 8);
        bytes
            .chunks_exact(8)
            .map(|it| u64::from_le_bytes(it.try_into().expect("8")))
            .collect()
    }

    pub fn write_words(&mut self, address: u64, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|it| it.to_le_bytes()).collect();
        self.write(address, &bytes);
    }

    pub fn write_longs(&mut self, address: u64, longs: &[u64]) {
        let bytes: Vec<u8> = longs.iter().flat_map(|it| it.to_le_bytes()).collect();
        self.write(address, &bytes);
    }

    /// Everything comes home; frames are handed out anew.
    pub fn bring_home(&mut self) {
        for page in 0..self.placed.len() {
            self.unmap(page as u64);
        }
        let mut frames: Vec<u64> = (0..self.frames.size / PAGE - 16).collect();
        // No order that a kernel could profit from.
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        if self.grain == Grain::Small {
            for at in (1..frames.len()).rev() {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                frames.swap(
                    at,
                    usize::try_from(seed % (at as u64 + 1)).expect("an index"),
                );
            }
        } else {
            frames = (0..self.frames.size / WIDE - 1).collect();
            frames.reverse();
        }
        self.free = frames;
    }

    /// Where the device sees memory that is in one piece.
    pub fn first_frame(&self) -> u64 {
        self.frames.address.next_multiple_of(WIDE)
    }

    fn leaf(&mut self, address: u64) -> usize {
        let index = (address >> table::ROOT_SHIFT).min(1 << 17);
        if let Some(at) = self.leaves.iter().position(|(it, _)| *it == index) {
            return at;
        }
        let leaf = self.gpu.buffer(table::LEAF_SIZE);
        long(&self.root, index * 8).store(leaf.address, Ordering::SeqCst);
        self.leaves.push((index, leaf));
        self.leaves.len() - 1
    }

    fn set_entry(&mut self, page: u64, entry: u64) {
        let address = self.base + page * PAGE;
        let leaf = self.leaf(address);
        let at = (address >> 12 & 0x3ffff) * 8;
        long(&self.leaves[leaf].1, at).store(entry, Ordering::SeqCst);
    }

    /// Enters a group; at 0 there is none.
    fn set_group(&mut self, page: u64, memory: u64, writable: bool) {
        let address = self.base + page * PAGE;
        let write = if writable { table::GROUP_WRITABLE } else { 0 };
        let tag = address >> 33 << 1 | table::GROUP_READABLE | write;
        let entry = if memory == 0 { 0 } else { memory | tag };
        let at = table::GROUPS_AT + (address >> 16 & (table::GROUPS - 1)) * 8;
        long(&self.root, at).store(entry, Ordering::SeqCst);
    }

    fn copy(&mut self, page: u64, frame: u64, home: bool) {
        let at = usize::try_from(page * PAGE).expect("an offset");
        let frame = usize::try_from(self.first_frame() - self.frames.address + frame * PAGE)
            .expect("an offset");
        let len = usize::try_from(PAGE).expect("a size");
        // SAFETY: a page of home and a frame of the buffer; no kernel accesses it
        // while it is copied.
        unsafe {
            let home_at = self.home.as_mut_ptr().add(at);
            let frame_at = self.frames.host.add(frame);
            if home {
                std::ptr::copy_nonoverlapping(frame_at, home_at, len)
            } else {
                std::ptr::copy_nonoverlapping(home_at, frame_at, len)
            }
        }
    }

    fn unmap(&mut self, page: u64) {
        if let Some(frame) = self.placed[usize::try_from(page).expect("a page")].take() {
            self.set_group(page, 0, false);
            self.set_entry(page, 0);
            self.copy(page, frame, true);
            match self.grain {
                Grain::Small => self.free.push(frame),
                Grain::Large | Grain::Torn if frame % 16 == 15 => self.free.push(frame / 16),
                Grain::Large | Grain::Torn => {}
            }
        }
    }

    /// Maps what a fault asks for.
    fn map(&mut self, fault: u64) {
        let writes = fault & 1 != 0;
        let page = (fault & !1).checked_sub(self.base).map(|it| it / PAGE);
        let page = page.filter(|&it| it < self.placed.len() as u64);
        let page = page.unwrap_or_else(|| {
            panic!("a kernel asked for {fault:#x}, which is no memory of the program")
        });
        let at = usize::try_from(page).expect("a page");
        let first = self.first_frame();
        match self.grain {
            Grain::Small => {
                let frame = match self.placed[at] {
                    Some(frame) => frame,
                    None => {
                        let frame = self.free.pop().expect("a frame");
                        self.copy(page, frame, false);
                        self.placed[at] = Some(frame);
                        frame
                    }
                };
                let rights = if writes { 3 } else { 1 };
                self.set_entry(page, (first + frame * PAGE) | rights);
            }
            Grain::Large | Grain::Torn => {
                let start = page / 16 * 16;
                let writable = self.grain == Grain::Large;
                let rights = if writable { 3 } else { 1 };
                assert_eq!(self.base % WIDE, 0, "wide pages are aligned alike");
                if self.placed[at].is_none() {
                    let frame = self.free.pop().expect("a frame") * 16;
                    for more in 0..16 {
                        self.copy(start + more, frame + more, false);
                        self.placed[usize::try_from(start + more).expect("a page")] =
                            Some(frame + more);
                    }
                    for more in 0..16 {
                        self.set_entry(start + more, (first + (frame + more) * PAGE) | rights);
                    }
                    self.set_group(start, first + frame * PAGE, writable);
                }
                if writes && !writable {
                    let frame = self.placed[at].expect("it has just been placed");
                    self.set_entry(page, (first + frame * PAGE) | 3);
                    self.asked.insert(page);
                }
            }
        }
    }

    /// Maps all of the program's memory.
    pub fn map_all(&mut self) {
        self.bring_home();
        for page in 0..self.placed.len() as u64 {
            self.map((self.base + page * PAGE) | 1);
        }
    }

    /// All of it in one piece, for the variants without a table: its device address.
    fn in_one_piece(&mut self) -> u64 {
        self.bring_home();
        for page in 0..self.placed.len() as u64 {
            self.copy(page, page, false);
            self.placed[usize::try_from(page).expect("a page")] = Some(page);
        }
        self.first_frame()
    }

    fn word(&self, offset: u64) -> &AtomicU32 {
        word(&self.control, offset)
    }

    /// Control block and log as before a launch.
    fn reset(&self, groups: u32) {
        for offset in (0..control::SIZE).step_by(4) {
            self.word(offset).store(0, Ordering::Relaxed);
        }
        self.word(control::LOG_CAPACITY)
            .store(self.log_capacity, Ordering::Relaxed);
        self.word(control::STALL_POLLS)
            .store(self.stall_polls, Ordering::Relaxed);
        long(&self.control, control::TABLE).store(self.root.address, Ordering::Relaxed);
        long(&self.control, control::LOG).store(self.log.address, Ordering::Relaxed);
        self.word(control::GROUPS).store(groups, Ordering::Relaxed);
        self.word(control::GROUPS + 4).store(1, Ordering::Relaxed);
        self.word(control::GROUPS + 8).store(1, Ordering::Relaxed);
        self.word(control::DISPATCHED + 4)
            .store(1, Ordering::Relaxed);
        self.word(control::DISPATCHED + 8)
            .store(1, Ordering::Relaxed);
        for index in 0..u64::from(self.log_capacity) {
            long(&self.log, index * 8).store(u64::MAX, Ordering::Relaxed);
        }
    }

    pub fn compile(&self, words: &[u32], variant: Variant) -> Pipeline {
        let options = Options {
            variant,
            control_spec_id: CONTROL,
        };
        let made =
            instrument(words, options).unwrap_or_else(|error| panic!("{variant:?}: {error}"));
        self.gpu.pipeline(
            &made.words,
            self.control.address,
            made.info.push_constant_bytes,
        )
    }

    /// Runs `groups` workgroups of 64 or fewer, in two dispatches where there are
    /// several, until all invocations are done.
    pub fn launch(
        &mut self,
        pipeline: &Pipeline,
        variant: Variant,
        push: &[u8],
        groups: u32,
    ) -> Report {
        let mut report = Report::default();
        self.reset(groups);
        match variant {
            Variant::Delta => {
                let at = self.in_one_piece();
                long(&self.control, control::DELTA)
                    .store(at.wrapping_sub(self.base), Ordering::Relaxed);
            }
            Variant::Masked => {
                let at = self.in_one_piece();
                let size = self.home.len() as u64;
                assert!(
                    size.is_power_of_two() && self.base.is_multiple_of(size),
                    "a window"
                );
                long(&self.control, control::MASK).store(size - 1, Ordering::Relaxed);
                long(&self.control, control::BASE).store(at, Ordering::Relaxed);
            }
            Variant::Table => self.map_all(),
            _ => self.bring_home(),
        }
        let first = groups / 3;
        for (base, count) in [(0, first), (first, groups - first)] {
            if count == 0 {
                continue;
            }
            self.word(control::BASE_GROUP)
                .store(base, Ordering::Relaxed);
            self.word(control::DISPATCHED)
                .store(count, Ordering::Relaxed);
            match variant {
                Variant::Checked => self.redispatch(pipeline, push, base, count, &mut report),
                Variant::Stall => self.serve(pipeline, push, base, count, &mut report),
                _ => {
                    let running = self.gpu.start(pipeline, push, base, count);
                    self.gpu.finish(running);
                    report.rounds += 1;
                }
            }
        }
        self.bring_home();
        report
    }

    /// Runs what is not done again until nothing is left.
    fn redispatch(
        &mut self,
        pipeline: &Pipeline,
        push: &[u8],
        base: u32,
        count: u32,
        report: &mut Report,
    ) {
        // SAFETY: the buffer's own size; nothing runs.
        unsafe {
            self.done
                .host
                .write_bytes(0, usize::try_from(self.done.size).expect("a size"))
        };
        long(&self.control, control::DONE).store(self.done.address, Ordering::Relaxed);
        loop {
            self.word(control::UNFINISHED).store(0, Ordering::SeqCst);
            self.word(control::STOP).store(0, Ordering::SeqCst);
            let running = self.gpu.start(pipeline, push, base, count);
            if let Some(after) = self.stop_after {
                std::thread::sleep(after);
                self.word(control::STOP).store(1, Ordering::SeqCst);
            }
            self.gpu.finish(running);
            report.rounds += 1;
            report.torn = self.word(control::TORN).load(Ordering::SeqCst);
            report.unfinished = self.word(control::UNFINISHED).load(Ordering::SeqCst);
            let served = self.serve_log();
            report.faults += served;
            if report.unfinished == 0 || (self.stop_after.is_some() && served == 0) {
                return;
            }
            assert!(
                served > 0,
                "{} invocations returned without a fault",
                report.unfinished
            );
            assert!(report.rounds < 100_000, "no end: {report:?}");
        }
    }

    /// Serves a dispatch while it runs.
    fn serve(
        &mut self,
        pipeline: &Pipeline,
        push: &[u8],
        base: u32,
        count: u32,
        report: &mut Report,
    ) {
        let running = self.gpu.start(pipeline, push, base, count);
        let start = Instant::now();
        while !self.gpu.has_ended(&running) {
            let served = self.serve_log();
            report.faults += served;
            if served > 0 && self.evict && report.evictions < 200 {
                report.evictions += u64::from(self.evict_some());
            }
            if self
                .evict_after
                .is_some_and(|after| start.elapsed() > after)
            {
                self.evict_after = None;
                report.evictions += u64::from(self.evict_some());
            }
            if self.stop_after.is_some_and(|after| start.elapsed() > after) {
                self.word(control::STOP).store(1, Ordering::SeqCst);
            }
            assert!(
                start.elapsed() < Duration::from_secs(50),
                "a kernel that does not end: {report:?}"
            );
            std::hint::spin_loop();
        }
        self.gpu.finish(running);
        report.rounds += 1;
        report.torn = self.word(control::TORN).load(Ordering::SeqCst);
        report.unfinished = self.word(control::UNFINISHED).load(Ordering::SeqCst);
        let (active, parked) = (
            self.word(control::ACTIVE).load(Ordering::SeqCst),
            self.word(control::PARKED).load(Ordering::SeqCst),
        );
        assert_eq!((active, parked), (0, 0), "who has come has gone");
        self.serve_log();
    }

    /// Takes everything away from a running kernel. The entries go first: a
    /// subgroup that begins later finds none, and one that was not parked by then
    /// may still use what it found.
    fn evict_some(&mut self) -> bool {
        self.word(control::YIELD).fetch_add(1, Ordering::SeqCst);
        for page in 0..self.placed.len() {
            if self.placed[page].is_some() {
                self.set_entry(page as u64, 0);
            }
        }
        let start = Instant::now();
        loop {
            let active = self.word(control::ACTIVE).load(Ordering::SeqCst);
            if self.word(control::PARKED).load(Ordering::SeqCst) == active {
                break;
            }
            let patience = Duration::from_secs(10);
            assert!(start.elapsed() < patience, "someone never parks");
            std::hint::spin_loop();
        }
        for page in 0..self.placed.len() as u64 {
            self.unmap(page);
        }
        self.word(control::YIELD).fetch_sub(1, Ordering::SeqCst);
        true
    }

    /// Serves what is in the log: how many entries.
    fn serve_log(&mut self) -> u64 {
        let mut served = 0;
        loop {
            let count = self.word(control::LOG_COUNT).load(Ordering::SeqCst);
            let tail = self.word(control::LOG_SERVED).load(Ordering::SeqCst);
            if count.wrapping_sub(tail) > self.log_capacity {
                served += self.serve_wanted();
                for index in 0..u64::from(self.log_capacity) {
                    long(&self.log, index * 8).store(u64::MAX, Ordering::SeqCst);
                }
                self.word(control::LOG_SERVED)
                    .store(count, Ordering::SeqCst);
                continue;
            }
            if count == tail {
                return served;
            }
            let at = u64::from(tail & (self.log_capacity - 1)) * 8;
            let fault = long(&self.log, at).load(Ordering::SeqCst);
            if fault == u64::MAX {
                return served;
            }
            long(&self.log, at).store(u64::MAX, Ordering::SeqCst);
            self.word(control::LOG_SERVED)
                .store(tail.wrapping_add(1), Ordering::SeqCst);
            self.answer(fault);
            served += 1;
        }
    }

    fn answer(&mut self, fault: u64) {
        self.map(fault);
        let leaf = self.leaf(fault);
        let bit = (fault >> 12 & 0x3ffff) * 2 + (fault & 1);
        let wanted = if self.leaves[leaf].0 == 1 << 17 {
            &self.empty
        } else {
            &self.leaves[leaf].1
        };
        word(wanted, table::WANTED + bit / 32 * 4).fetch_and(!(1 << (bit % 32)), Ordering::SeqCst);
        // It may have been asked for before there was a leaf.
        word(&self.empty, table::WANTED + bit / 32 * 4)
            .fetch_and(!(1 << (bit % 32)), Ordering::SeqCst);
    }

    /// Serves everything that is wanted, logged or not.
    fn serve_wanted(&mut self) -> u64 {
        let mut served = 0;
        for page in 0..self.placed.len() as u64 {
            let address = self.base + page * PAGE;
            let leaf = self.leaf(address);
            for access in 0..2 {
                let bit = (address >> 12 & 0x3ffff) * 2 + access;
                let at = table::WANTED + bit / 32 * 4;
                let wanted = word(&self.leaves[leaf].1, at).load(Ordering::SeqCst)
                    | word(&self.empty, at).load(Ordering::SeqCst);
                if wanted >> (bit % 32) & 1 != 0 {
                    self.answer(address | access);
                    served += 1;
                }
            }
        }
        served
    }

    /// Processor time of a dispatch whose memory is all mapped: the device is this
    /// process, and what else runs on the machine does not count.
    pub fn time(
        &mut self,
        pipeline: &Pipeline,
        variant: Option<Variant>,
        push: &[u8],
        groups: u32,
    ) -> Duration {
        self.word(control::BASE_GROUP).store(0, Ordering::Relaxed);
        self.word(control::DISPATCHED)
            .store(groups, Ordering::Relaxed);
        if variant == Some(Variant::Checked) {
            // SAFETY: the buffer's own size; nothing runs.
            unsafe {
                self.done
                    .host
                    .write_bytes(0, usize::try_from(self.done.size).expect("a size"))
            };
            long(&self.control, control::DONE).store(self.done.address, Ordering::Relaxed);
        }
        let start = processor_time();
        let running = self.gpu.start(pipeline, push, 0, groups);
        self.gpu.finish(running);
        let took = processor_time() - start;
        assert_eq!(
            self.word(control::UNFINISHED).load(Ordering::Relaxed),
            0,
            "all is mapped"
        );
        took
    }

    /// Prepares for [`time`](Self::time): where the memory is in one piece.
    pub fn prepare(&mut self, variant: Option<Variant>, groups: u32) {
        self.reset(groups);
        match variant {
            None | Some(Variant::Delta | Variant::Masked) => {
                let at = self.in_one_piece();
                long(&self.control, control::DELTA)
                    .store(at.wrapping_sub(self.base), Ordering::Relaxed);
                long(&self.control, control::MASK)
                    .store(self.home.len() as u64 - 1, Ordering::Relaxed);
                long(&self.control, control::BASE).store(at, Ordering::Relaxed);
            }
            _ => self.map_all(),
        }
    }
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).expect("seconds"),
        u32::try_from(time.tv_nsec).expect("nanoseconds"),
    )
}

fn word(buffer: &Buffer, offset: u64) -> &AtomicU32 {
    assert!(
        offset.is_multiple_of(4) && offset + 4 <= buffer.size,
        "in the buffer"
    );
    // SAFETY: aligned and in mapped memory, which host and device access atomically.
    unsafe {
        AtomicU32::from_ptr(
            buffer
                .host
                .add(usize::try_from(offset).expect("an offset"))
                .cast(),
        )
    }
}

fn long(buffer: &Buffer, offset: u64) -> &AtomicU64 {
    assert!(
        offset.is_multiple_of(8) && offset + 8 <= buffer.size,
        "in the buffer"
    );
    // SAFETY: as for a word.
    unsafe {
        AtomicU64::from_ptr(
            buffer
                .host
                .add(usize::try_from(offset).expect("an offset"))
                .cast(),
        )
    }
}
