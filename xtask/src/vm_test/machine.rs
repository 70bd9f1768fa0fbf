//! The virtual machine: QEMU, which emulates the processor in software, so that
//! it runs everywhere and takes any kernel.
//!
//! Both processors of the guest take turns on one thread. With a thread for each,
//! QEMU 7.2 runs code that the guest changes at that moment in its old form, and
//! newer kernels, which change theirs all the time, die while they start.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::kernel::Kernel;
use super::plan::PATIENCE;
use super::reader::{News, Ran, Reader};
use crate::log::Log;
use crate::packages;
use crate::session::{self, Ended, Patience};

/// What a guest may take from one line of news to the next: a test's time, and
/// some for itself.
const SILENCE: Duration = Duration::from_secs(PATIENCE.as_secs() + 60);
const DISK_BYTES: u64 = 512 << 20;

/// A machine that is ready to start.
#[derive(Debug)]
pub struct Machine {
    /// Of Linux.
    pub version: String,
    image: PathBuf,
    files: PathBuf,
    disk: PathBuf,
    folder: PathBuf,
}

/// What became of a machine.
#[derive(Debug, Default)]
pub struct Run {
    pub version: String,
    /// From the start to the guest's first line.
    pub boot: Duration,
    pub time: Duration,
    pub tests: Vec<Ran>,
    pub broken: Vec<String>,
    /// How the guest ended early while no test ran, and its last lines.
    pub broken_off: Option<(String, Vec<String>)>,
    pub log: PathBuf,
}

impl Machine {
    /// Makes its disk. The guest's first file system is to be written to `files`.
    pub fn new(kernel: &Kernel, folder: &Path) -> Result<Self> {
        let machine = Self {
            version: kernel.linux().to_owned(),
            image: kernel.image()?,
            files: folder.join("initramfs.cpio"),
            disk: folder.join("disk"),
            folder: folder.to_owned(),
        };
        fs::create_dir_all(folder)?;
        File::create(&machine.disk)
            .and_then(|file| file.set_len(DISK_BYTES))
            .with_context(|| format!("cannot make {}", machine.disk.display()))?;
        Ok(machine)
    }

    pub fn files(&self) -> &Path {
        &self.files
    }

    /// The command that starts it.
    pub fn words(&self) -> Vec<String> {
        let words = "-machine q35,nvdimm=on -accel tcg,thread=single -cpu max,la57=off -smp 2 \
             -m 3G,slots=2,maxmem=8G -nodefaults -no-user-config -no-reboot -display none \
             -serial stdio \
             -object memory-backend-ram,id=module,size=512M -device nvdimm,memdev=module \
             -object memory-backend-memfd,id=shared,size=512M -device virtio-pmem-pci,memdev=shared";
        let mut all = vec![packages::QEMU.program.to_owned()];
        all.extend(words.split_whitespace().map(str::to_owned));
        let disk = format!("if=virtio,format=raw,file={}", self.disk.display());
        // A kernel that panics restarts at once, and a restart ends the machine.
        let settings = "console=ttyS0 panic=-1 quiet loglevel=4";
        let more = [
            ("-drive", disk),
            ("-kernel", self.image.display().to_string()),
            ("-initrd", self.files.display().to_string()),
            ("-append", settings.to_owned()),
        ];
        for (option, value) in more {
            all.extend([option.to_owned(), value]);
        }
        all
    }

    /// Runs it to its end, and tells what happens.
    pub fn run(&self, limit: Duration, mut tell: impl FnMut(&News)) -> Result<Run> {
        let mut run = Run {
            version: self.version.clone(),
            log: self.folder.join("console.log"),
            ..Run::default()
        };
        let mut log = Log::create(&run.log)?;
        let mut reader = Reader::new();
        let mut done = false;
        let start = Instant::now();
        let words = self.words();
        let words: Vec<_> = words.iter().map(Path::new).collect();
        let patience = Patience {
            without_progress: SILENCE,
            in_all: limit,
        };
        let ended = session::run(&words, &self.folder, patience, |line| {
            log.line(line);
            let Some(news) = reader.line(line) else {
                return false;
            };
            tell(&news);
            match news {
                News::Booted(_) => run.boot = start.elapsed(),
                News::Broken(what) => run.broken.push(what),
                News::Ended(ran) => run.tests.push(ran),
                News::Done => done = true,
                News::Shown(_) | News::Begun => {}
            }
            true
        })?;
        log.end(&ended.to_string());
        run.time = start.elapsed();
        if !done {
            let why = early(&ended);
            match reader.broken_off(&why) {
                Some(ran) => {
                    tell(&News::Ended(ran.clone()));
                    run.tests.push(ran);
                }
                None => run.broken_off = Some((why, reader.last_lines().to_vec())),
            }
        }
        Ok(run)
    }

    /// Removes what is large.
    pub fn clear(&self) {
        let _ = fs::remove_file(&self.disk);
        let _ = fs::remove_file(&self.files);
    }
}

fn early(ended: &Ended) -> String {
    match ended {
        Ended::ByItself(_) => format!("the guest stopped before its end: {ended}"),
        Ended::OutOfTime(_) => format!("the guest hangs or is too slow: {ended}"),
    }
}
