//! What all tests on the real kernel share: plain mappings with a known
//! pattern, a watchdog, forked children and helpers in processes of their own.
#![allow(dead_code, reason = "each test binary uses some of it")]
#![allow(unreachable_pub, reason = "one module in many binaries")]

pub mod either;
pub mod peer;
pub mod pool;

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hmm::{
    ByteCount, Hmm, PAGE_SIZE, PageCount, PageRange, Report, SoftwareDevice, SoftwareOptions,
    StayReason, VirtAddr,
};

#[allow(unused_imports, reason = "each test binary uses some of it")]
pub use either::{AnyDevice, Device, Failure, Kind, Operation, Work, add, open};

/// Bytes of a page.
pub const PAGE: usize = 4096;
const _: () = assert!(PAGE_SIZE == 4096);
/// Words of a page.
pub const WORDS: usize = PAGE / 8;
/// Pages of a huge page.
pub const HUGE: usize = 512;

/// Ends the process with a message when a test takes too long: a hang must not
/// look like a slow test.
#[derive(Debug)]
pub struct Watchdog(#[allow(dead_code, reason = "dropping it calls the dog off")] mpsc::Sender<()>);

/// Lets the test called `name` run for so many seconds at most.
pub fn watchdog(name: &'static str, seconds: u64) -> Watchdog {
    let (sender, receiver) = mpsc::channel::<()>();
    // A test may forbid the process more memory, which a starting thread needs.
    let (started, starts) = mpsc::channel::<()>();
    std::thread::Builder::new()
        .name("watchdog".into())
        .spawn(move || {
            let _ = started.send(());
            let end = receiver.recv_timeout(Duration::from_secs(seconds));
            if end == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("watchdog: {name} hangs: not done after {seconds} s");
                if let Ok(file) = std::env::var("HMM_WATCHDOG_WAITS") {
                    eprintln!("watchdog: process {} waits ({file})", std::process::id());
                    std::thread::sleep(Duration::from_secs(3600));
                }
                std::process::abort();
            }
        })
        .expect("a watchdog thread");
    starts.recv().expect("the watchdog has started");
    Watchdog(sender)
}

/// Says aloud that a test cannot run here.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        eprintln!("SKIPPED {}: {}", module_path!(), format_args!($($why)*));
        return;
    }};
}

/// Skips what takes UFFDIO_MOVE (Linux 6.8), and says what for.
#[macro_export]
macro_rules! needs_move {
    ($hmm:expr, $what:literal) => {
        if !$hmm.moves_pages() {
            $crate::skip!("{} without UFFDIO_MOVE (docs/virtual-machine.md)", $what);
        }
    };
}

/// An engine and a device with `mib` MiB of memory, which is poisoned when freed.
pub fn engine(mib: u64) -> (Hmm, SoftwareDevice) {
    engine_of(Hmm::builder(), mib)
}

/// The same with chosen settings.
pub fn engine_of(builder: hmm::Builder, mib: u64) -> (Hmm, SoftwareDevice) {
    let hmm = builder.open().expect("an engine");
    let device = device(&hmm, mib);
    (hmm, device)
}

/// A device with `mib` MiB of memory.
pub fn device(hmm: &Hmm, mib: u64) -> SoftwareDevice {
    let options = SoftwareOptions::new(ByteCount::mib(mib)).poison_freed(true);
    hmm.add_software_device(options).expect("a device")
}

/// Moves all of `range` to the device, with patience for what is only busy or
/// was given back a moment ago.
pub fn send(hmm: &Hmm, range: PageRange, device: &impl AnyDevice) -> Report {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let report = hmm.migrate(range, device.id()).expect("a migration");
        adds_up(&report, range);
        let passing = report.stayed.iter().all(|stay| {
            matches!(
                stay.reason,
                StayReason::Busy
                    | StayReason::Discarded
                    | StayReason::SharedCow
                    | StayReason::Raced
            )
        });
        if report.is_complete() || !passing || Instant::now() > end {
            assert!(report.is_complete(), "{report}");
            return report;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Brings everything of `range` home and checks the report.
pub fn fetch(hmm: &Hmm, range: PageRange) -> Report {
    let report = hmm.evict(range).expect("an eviction");
    adds_up(&report, range);
    report
}

/// Every page of the request is counted once.
pub fn adds_up(report: &Report, range: PageRange) {
    assert_eq!(
        report.total(),
        range.pages(),
        "a report that does not add up: {report:?}"
    );
    let listed: PageCount = report.stayed.iter().map(|stay| stay.range.pages()).sum();
    if report.truncated {
        assert!(listed < report.stayed_pages, "{report:?}");
    } else {
        assert_eq!(listed, report.stayed_pages, "{report:?}");
    }
    for stay in &report.stayed {
        assert!(
            range.encloses(stay.range),
            "{:?} is no part of {range:?}",
            stay.range
        );
    }
    assert!(
        report.zeroed <= report.moved && report.huge <= report.moved,
        "{report:?}"
    );
}

/// Pages of `range` on the device.
pub fn on_device(hmm: &Hmm, range: PageRange, device: &impl AnyDevice) -> u64 {
    hmm.residency(range)
        .expect("residency")
        .on_device(device.id())
        .get()
}

/// Nothing of the device's memory is in use once all is home. (A kernel's fault
/// takes along neighbours that belong to others: the test's own heap, say.)
pub fn all_free(hmm: &Hmm, device: &impl AnyDevice) {
    let everything = PageRange::span(VirtAddr::new(4096), VirtAddr::new((1 << 47) - 8192));
    hmm.evict(everything).expect("an eviction");
    let end = Instant::now() + Duration::from_secs(10);
    while device.free_memory() != device.memory() {
        assert!(
            Instant::now() < end,
            "device memory leaked: {} of {} free",
            device.free_memory(),
            device.memory()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// No staging page is held, perhaps after a moment.
pub fn nothing_staged(hmm: &Hmm) {
    let end = Instant::now() + Duration::from_secs(10);
    while hmm.staging_held().get() != 0 {
        assert!(
            Instant::now() < end,
            "{} staging pages are held",
            hmm.staging_held()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The word at `index` of a pattern.
pub const fn pattern(seed: u64, index: usize) -> u64 {
    let mut x = seed ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 29)
}

/// Memory straight from mmap(2).
#[derive(Debug)]
pub struct Map {
    at: *mut u8,
    pages: usize,
}

// SAFETY: plain memory; the tests see to who touches what.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Private anonymous memory of `pages` pages.
    pub fn new(pages: usize) -> Self {
        Self::with(
            pages,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE,
            -1,
        )
    }

    /// Memory with chosen protection and flags; anonymous without descriptor.
    pub fn with(pages: usize, protection: i32, flags: i32, fd: i32) -> Self {
        let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
        // SAFETY: a new mapping, wherever the kernel likes.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages * PAGE,
                protection,
                flags | anonymous,
                fd,
                0,
            )
        };
        assert_ne!(
            at,
            libc::MAP_FAILED,
            "mmap: {}",
            std::io::Error::last_os_error()
        );
        Self {
            at: at.cast(),
            pages,
        }
    }

    /// Memory whose start is a multiple of 2 MiB, with or without huge pages.
    pub fn aligned(pages: usize, huge: bool) -> Self {
        let spare = Self::with(pages + HUGE, libc::PROT_NONE, libc::MAP_PRIVATE, -1);
        let start = (spare.at as usize).next_multiple_of(HUGE * PAGE);
        let end = spare.at as usize + spare.bytes();
        let at = std::ptr::with_exposed_provenance_mut::<u8>(start);
        // SAFETY: all of it lies in the mapping that was just made.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let got = libc::mmap(at.cast(), pages * PAGE, protection, flags, -1, 0);
            assert_ne!(got, libc::MAP_FAILED);
            if start > spare.at as usize {
                libc::munmap(spare.at.cast(), start - spare.at as usize);
            }
            let tail = start + pages * PAGE;
            if end > tail {
                libc::munmap(at.add(pages * PAGE).cast(), end - tail);
            }
            let advice = if huge {
                libc::MADV_HUGEPAGE
            } else {
                libc::MADV_NOHUGEPAGE
            };
            let _ = libc::madvise(at.cast(), pages * PAGE, advice);
        }
        std::mem::forget(spare);
        Self { at, pages }
    }

    /// A handle to memory that is mapped by other means; dropping it unmaps it.
    pub const fn adopt(at: *mut u8, pages: usize) -> Self {
        Self { at, pages }
    }

    /// Where it begins.
    pub const fn at(&self) -> *mut u8 {
        self.at
    }

    /// Number of pages.
    pub const fn pages(&self) -> usize {
        self.pages
    }

    /// Number of bytes.
    pub const fn bytes(&self) -> usize {
        self.pages * PAGE
    }

    /// All of it.
    pub fn range(&self) -> PageRange {
        self.part(0, self.pages)
    }

    /// Some pages of it.
    pub fn part(&self, first: usize, pages: usize) -> PageRange {
        let start = VirtAddr::new((self.at as usize + first * PAGE) as u64);
        PageRange::from_pages(start, PageCount::new(pages as u64))
    }

    /// Address of a page.
    pub fn page(&self, index: usize) -> *mut u8 {
        self.at.wrapping_add(index * PAGE)
    }

    /// Address of a word.
    pub fn word(&self, index: usize) -> *mut u64 {
        self.at.cast::<u64>().wrapping_add(index)
    }

    /// Reads a word.
    pub fn get(&self, index: usize) -> u64 {
        debug_assert!(index < self.pages * WORDS);
        // SAFETY: in the mapping, which the test keeps readable.
        unsafe { self.word(index).read_volatile() }
    }

    /// Writes a word.
    pub fn set(&self, index: usize, value: u64) {
        debug_assert!(index < self.pages * WORDS);
        // SAFETY: in the mapping, which the test keeps writable.
        unsafe { self.word(index).write_volatile(value) }
    }

    /// Writes a pattern into some pages.
    pub fn fill_part(&self, first: usize, pages: usize, seed: u64) {
        for index in first * WORDS..(first + pages) * WORDS {
            self.set(index, pattern(seed, index));
        }
    }

    /// Writes a pattern into all of it.
    pub fn fill(&self, seed: u64) {
        self.fill_part(0, self.pages, seed);
    }

    /// The first word of some pages that is not as the pattern says.
    pub fn wrong(&self, first: usize, pages: usize, seed: u64) -> Option<usize> {
        (first * WORDS..(first + pages) * WORDS)
            .find(|&index| self.get(index) != pattern(seed, index))
    }

    /// Checks a pattern in some pages.
    #[track_caller]
    pub fn check_part(&self, first: usize, pages: usize, seed: u64) {
        if let Some(index) = self.wrong(first, pages, seed) {
            panic!(
                "page {} word {}: {:#x} instead of {:#x}, and then {:#x}",
                index / WORDS,
                index % WORDS,
                self.get(index),
                pattern(seed, index),
                self.get(index)
            );
        }
    }

    /// Checks a pattern in all of it.
    #[track_caller]
    pub fn check(&self, seed: u64) {
        self.check_part(0, self.pages, seed);
    }

    /// The first word of some pages that is not zero.
    pub fn not_zero(&self, first: usize, pages: usize) -> Option<usize> {
        (first * WORDS..(first + pages) * WORDS).find(|&index| self.get(index) != 0)
    }

    /// Checks that some pages are zeros.
    #[track_caller]
    pub fn check_zero(&self, first: usize, pages: usize) {
        if let Some(index) = self.not_zero(first, pages) {
            panic!(
                "page {} holds {:#x} instead of 0",
                index / WORDS,
                self.get(index)
            );
        }
    }

    /// madvise(2) on some pages.
    pub fn advise(&self, first: usize, pages: usize, advice: i32) -> bool {
        // SAFETY: in the mapping; the test knows what it does to the content.
        unsafe { libc::madvise(self.page(first).cast(), pages * PAGE, advice) == 0 }
    }

    /// mprotect(2) on some pages.
    pub fn protect(&self, first: usize, pages: usize, protection: i32) {
        // SAFETY: in the mapping.
        let ok = unsafe { libc::mprotect(self.page(first).cast(), pages * PAGE, protection) == 0 };
        assert!(ok, "mprotect: {}", std::io::Error::last_os_error());
    }

    /// munmap(2) of some pages in it.
    pub fn unmap_part(&self, first: usize, pages: usize) {
        // SAFETY: in the mapping; the test does not use them any more.
        let ok = unsafe { libc::munmap(self.page(first).cast(), pages * PAGE) == 0 };
        assert!(ok, "munmap: {}", std::io::Error::last_os_error());
    }

    /// Forgets it without unmapping it.
    pub fn leak(self) {
        std::mem::forget(self);
    }

    /// mremap(2) to wherever the kernel likes, or to `to`.
    pub fn remap(self, pages: usize, flags: i32, to: Option<*mut u8>) -> Self {
        let to = to.unwrap_or(std::ptr::null_mut());
        let fixed = if to.is_null() { 0 } else { libc::MREMAP_FIXED };
        let old = self.bytes();
        // SAFETY: the mapping is this one's own, and given up by it.
        let at = unsafe {
            if fixed == 0 {
                libc::mremap(self.at.cast(), old, pages * PAGE, flags)
            } else {
                libc::mremap(self.at.cast(), old, pages * PAGE, flags | fixed, to)
            }
        };
        assert_ne!(
            at,
            libc::MAP_FAILED,
            "mremap: {}",
            std::io::Error::last_os_error()
        );
        std::mem::forget(self);
        Self {
            at: at.cast(),
            pages,
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: its own mapping.
        unsafe { libc::munmap(self.at.cast(), self.bytes()) };
    }
}

/// Forks; the child runs `body`, which may only touch memory, and ends with
/// what it returns. Allocating there could meet a lock that another thread
/// held.
pub fn fork(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child does nothing that is not safe after a fork.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        let status = body();
        // SAFETY: ends the child on the spot.
        unsafe { libc::_exit(status) };
    }
    pid
}

/// Waits for a child of [`fork`]: its exit status, or minus the signal.
pub fn wait(pid: i32) -> i32 {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let mut status = 0;
        // SAFETY: one of this process's own children.
        let got = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        assert!(got >= 0, "waitpid: {}", std::io::Error::last_os_error());
        if got == pid {
            return if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status)
            } else {
                -libc::WTERMSIG(status)
            };
        }
        if Instant::now() > end {
            if std::env::var_os("HMM_WATCHDOG_WAITS").is_some() {
                eprintln!("child {pid} of {} hangs", std::process::id());
                std::thread::sleep(Duration::from_secs(3600));
            }
            // SAFETY: as above.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            panic!("child {pid} hangs");
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Name of the helper that this process is to be, if it is one.
pub fn role() -> Option<String> {
    std::env::var("HMM_TEST_ROLE").ok()
}

/// Runs the test `test` of this very binary again, in a process of its own, as
/// helper `role`.
pub fn helper(test: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("HMM_TEST_ROLE", role)
        .stdin(Stdio::null());
    command
}

/// The signal that ends a process which needs data that was lost with its device:
/// where the kernel marks no pages (Linux 6.5 and older) the engine ends it.
pub fn signal_of_lost_data(hmm: &Hmm) -> i32 {
    if hmm.marks_lost_pages() {
        libc::SIGBUS
    } else {
        libc::SIGABRT
    }
}

/// Waits for a process at most so long; its status, or `None` (it is killed
/// then).
pub fn wait_at_most(child: &mut Child, seconds: u64) -> Option<ExitStatus> {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(status) = child.try_wait().expect("wait for a child") {
            return Some(status);
        }
        if Instant::now() > end {
            if std::env::var_os("HMM_WATCHDOG_WAITS").is_some() {
                eprintln!("helper {} hangs", child.id());
                std::thread::sleep(Duration::from_secs(3600));
            }
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs a helper to its end: status (`None`: it hung) and all that it wrote.
pub fn run(mut command: Command, seconds: u64) -> (Option<ExitStatus>, String) {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a helper process");
    let mut readers = Vec::new();
    let pipes: [Box<dyn Read + Send>; 2] = [
        Box::new(child.stdout.take().expect("piped")),
        Box::new(child.stderr.take().expect("piped")),
    ];
    for mut pipe in pipes {
        readers.push(std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        }));
    }
    let status = wait_at_most(&mut child, seconds);
    let text = readers
        .into_iter()
        .map(|reader| reader.join().expect("a reader"))
        .collect();
    (status, text)
}

/// A small generator of random numbers: same seed, same numbers.
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`.
    pub const fn below(&mut self, bound: usize) -> usize {
        ((self.next() >> 11) % bound as u64) as usize
    }
}

/// The seed of this run: HMM_TEST_SEED, or the time.
pub fn seed() -> u64 {
    std::env::var("HMM_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| {
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |time| u64::from(time.subsec_nanos()) ^ time.as_secs())
        })
}

/// Whether this process is root.
pub fn is_root() -> bool {
    // SAFETY: no arguments, no failure.
    unsafe { libc::geteuid() == 0 }
}
