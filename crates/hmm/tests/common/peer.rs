//! Regions that processes share: helper processes that have one attached, and words
//! of it that everybody counts in.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use hmm::{Pointer, attach};

use super::{Map, PAGE, WORDS, helper, role, wait_at_most};

/// Where a helper finds the path of a region.
pub const PATH: &str = "HMM_TEST_SHARED_PATH";

/// A path that nothing has yet.
pub fn fresh_path(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("hmm-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

/// A process that has the region attached, and does what it is told.
pub struct Peer {
    pub child: Child,
    says: BufReader<ChildStdout>,
    hears: ChildStdin,
}

impl Peer {
    pub fn start(test: &str, path: &Path) -> Self {
        let mut child = helper(test, "peer")
            .env(PATH, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut says = BufReader::new(child.stdout.take().unwrap());
        let hears = child.stdin.take().unwrap();
        // What the test harness of that process says comes first.
        let mut line = String::new();
        while !line.ends_with("attached\n") {
            line.clear();
            assert!(says.read_line(&mut line).unwrap() > 0, "no peer");
        }
        Self { child, says, hears }
    }

    pub fn tell(&mut self, what: &str) {
        writeln!(self.hears, "{what}").unwrap();
    }

    pub fn answer(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    #[track_caller]
    pub fn does(&mut self, what: &str) {
        self.tell(what);
        assert_eq!(self.answer(), "done", "{what}");
    }

    pub fn ends(mut self) {
        self.does("end");
        assert!(wait_at_most(&mut self.child, 20).unwrap().success());
    }
}

/// Body of such a process; true when this is one.
pub fn is_peer() -> bool {
    if role().as_deref() != Some("peer") {
        return false;
    }
    let region = attach(std::env::var_os(PATH).unwrap()).unwrap();
    let map = Map::adopt(region.as_ptr(), region.range().pages().index());
    println!("\nattached");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let what = words.next().unwrap_or_default();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        let number = |index: usize| usize::try_from(numbers[index]).unwrap();
        match what {
            "check" => match map.wrong(number(0), number(1), numbers[2]) {
                None => println!("done"),
                Some(index) => println!("page {} is {:#x}", index / WORDS, map.get(index)),
            },
            "fill" => {
                map.fill_part(number(0), number(1), numbers[2]);
                println!("done");
            }
            "count" => {
                count(&map, number(0), numbers[1]);
                println!("done");
            }
            "replace" => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                let access = libc::PROT_READ | libc::PROT_WRITE;
                let at = map.page(number(0)).cast();
                // SAFETY: a page of this process's own mapping.
                let got = unsafe { libc::mmap(at, PAGE, access, flags, -1, 0) };
                assert_eq!(got, at);
                println!("done");
            }
            "end" => {
                map.leak();
                drop(region);
                println!("done");
                return true;
            }
            other => panic!("{other}?"),
        }
    }
    true
}

/// Adds one to a word of every page, so many times; all use the same words.
pub fn count(map: &Map, word: usize, times: u64) {
    for _ in 0..times {
        for page in 0..map.pages() {
            counter(map, page, word).fetch_add(1, Ordering::Relaxed);
        }
    }
}

pub fn counter(map: &Map, page: usize, word: usize) -> &AtomicU64 {
    // SAFETY: a word of the region, which is used as an atomic only.
    unsafe { AtomicU64::from_ptr(map.word(page * WORDS + word)) }
}

/// Adds one to a word of every page, on the device.
pub fn count_on(device: &hmm::SoftwareDevice, map: &Map, word: usize) {
    let start = Pointer::new(map.at().cast::<u64>());
    device
        .launch(map.pages(), |context, page| {
            context.fetch_add(start.at(page * WORDS + word), 1)?;
            Ok(())
        })
        .unwrap();
}
