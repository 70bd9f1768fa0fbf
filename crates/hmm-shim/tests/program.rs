//! Programs under the library: each test runs itself again with it preloaded.
//!
//! Faults inside of system calls, which some of this needs, take privilege:
//! without it those tests skip.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::Command;
use std::ptr;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const SCENARIO: &str = "HMM_SHIM_TEST";
const PATIENCE: Duration = Duration::from_secs(60);

const READ: u64 = 0xc028_4800;
const WRITE: u64 = 0xc028_4801;
const TO_DEVICE: u64 = 0xc028_4802;
const TO_SYSTEM: u64 = 0xc028_4803;
const SNAPSHOT: u64 = 0xc028_4804;
const EXCLUSIVE: u64 = 0xc028_4805;
const CHECK_EXCLUSIVE: u64 = 0xc028_4806;

/// Runs `body` in a process of its own, under the library.
fn under_shim(name: &str, body: fn()) {
    if std::env::var_os(SCENARIO).is_some() {
        return body();
    }
    let exe = std::env::current_exe().unwrap();
    let mut child = Command::new(&exe)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(SCENARIO, "1")
        .env("HMM_DEVICE_MEMORY", "64")
        .env("LD_PRELOAD", shim())
        .spawn()
        .unwrap();
    let since = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if since.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{name} hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{name}: {status}");
}

fn shim() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let places = exe.ancestors().skip(1).take(2);
    let mut found = places.map(|place| place.join("libhmm_shim.so"));
    found
        .find(|path| path.exists())
        .expect("the library is built")
}

/// Whether the engine serves faults inside of system calls here.
fn is_privileged() -> bool {
    // SAFETY: asks for a number.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        eprintln!(
            "SKIPPED {}: faults inside of system calls take CAP_SYS_PTRACE",
            module_path!()
        );
    }
    root
}

fn device(unit: u32) -> OwnedFd {
    let path = std::ffi::CString::new(format!("/dev/hmm_dmirror{unit}")).unwrap();
    // SAFETY: a C string; the descriptor is new.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

/// Memory of whole pages, filled with a pattern.
struct Area {
    start: *mut u64,
    pages: usize,
}

impl Area {
    fn new(pages: usize) -> Self {
        // SAFETY: a fresh mapping.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        let area = Self {
            start: start.cast(),
            pages,
        };
        area.fill(1);
        area
    }

    fn words(&self) -> usize {
        self.pages * PAGE / 8
    }

    fn fill(&self, seed: u64) {
        for index in 0..self.words() {
            // SAFETY: inside of the mapping, which nobody refers to.
            unsafe {
                self.start
                    .add(index)
                    .write_volatile(seed * 1000 + index as u64)
            };
        }
    }

    fn check(&self, seed: u64) {
        for index in 0..self.words() {
            // SAFETY: as above.
            let word = unsafe { self.start.add(index).read_volatile() };
            assert_eq!(word, seed * 1000 + index as u64, "word {index}");
        }
    }

    fn protect(&self, protection: c_int) {
        // SAFETY: this area's own pages.
        let done = unsafe { libc::mprotect(self.start.cast(), self.pages * PAGE, protection) };
        assert_eq!(done, 0);
    }
}

#[repr(C)]
#[derive(Default)]
struct Cmd {
    addr: u64,
    ptr: u64,
    npages: u64,
    cpages: u64,
    faults: u64,
}

fn raw(fd: RawFd, request: u64, command: *mut Cmd) -> Result<(), c_int> {
    // SAFETY: the library checks what it is given.
    match unsafe { libc::ioctl(fd, request, command) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

fn ask(fd: &OwnedFd, request: u64, area: &Area, mirror: &Area) -> Result<(u64, u64), c_int> {
    let mut command = Cmd {
        addr: area.start as u64,
        ptr: mirror.start as u64,
        npages: area.pages as u64,
        ..Cmd::default()
    };
    raw(fd.as_raw_fd(), request, &raw mut command)?;
    Ok((command.cpages, command.faults))
}

/// Forks; the child runs `body` and ends with 0, or not if it panics.
fn forked(body: impl FnOnce()) -> libc::pid_t {
    // SAFETY: the child is a thread like this one.
    match unsafe { libc::fork() } {
        0 => {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        child => child,
    }
}

fn waited(child: libc::pid_t) {
    let mut status = 0;
    // SAFETY: this process's own child.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "the child failed");
}

#[test]
fn errors_are_those_of_the_driver() {
    under_shim("errors_are_those_of_the_driver", || {
        let fd = device(0);
        let (area, mirror) = (Area::new(4), Area::new(4));
        let with = |addr: u64, ptr: u64, npages: u64, request| {
            let mut command = Cmd {
                addr,
                ptr,
                npages,
                ..Cmd::default()
            };
            raw(fd.as_raw_fd(), request, &raw mut command)
        };
        let (addr, ptr) = (area.start as u64, mirror.start as u64);
        for request in [READ, WRITE, TO_DEVICE, TO_SYSTEM, SNAPSHOT, EXCLUSIVE] {
            assert_eq!(with(addr + 8, ptr, 1, request), Err(libc::EINVAL));
            assert_eq!(with(addr, ptr, 0, request), Err(libc::EINVAL));
            assert_eq!(with(addr, ptr, u64::MAX / 4096, request), Err(libc::EINVAL));
        }
        // An ioctl that does not exist, a closed descriptor, no structure.
        assert_eq!(with(addr, ptr, 1, 0xc028_480f), Err(libc::EINVAL));
        assert_eq!(with(addr, ptr, 1, 0x5401), Err(libc::EINVAL));
        assert_eq!(raw(999, READ, &mut Cmd::default()), Err(libc::EBADF));
        assert_eq!(
            raw(fd.as_raw_fd(), READ, ptr::null_mut()),
            Err(libc::EFAULT)
        );
        // Nothing mapped; nowhere to copy to or from.
        assert_eq!(with(0x1000, ptr, 1, READ), Err(libc::EFAULT));
        assert_eq!(with(0x1000, ptr, 1, WRITE), Err(libc::EFAULT));
        assert_eq!(with(0x1000, ptr, 1, TO_DEVICE), Err(libc::EINVAL));
        assert_eq!(with(0x1000, ptr, 1, TO_SYSTEM), Err(libc::EINVAL));
        assert_eq!(with(0x1000, ptr, 1, EXCLUSIVE), Err(libc::EFAULT));
        assert_eq!(with(addr, 8, 1, READ), Err(libc::EFAULT));
        assert_eq!(with(addr, 8, 1, WRITE), Err(libc::EFAULT));
        assert_eq!(with(addr, 8, 1, SNAPSHOT), Err(libc::EFAULT));
        area.check(1);
        // Descriptors of other kinds are left alone.
        assert_eq!(raw(0, READ, &mut Cmd::default()), Err(libc::ENOTTY));
    });
}

#[test]
fn protections_are_kept() {
    under_shim("protections_are_kept", || {
        let fd = device(0);
        let (area, mirror) = (Area::new(64), Area::new(64));
        mirror.fill(2);
        for migrated in [false, true] {
            if migrated {
                area.protect(libc::PROT_READ);
                assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((64, 0)));
                mirror.check(1);
                mirror.fill(2);
            }
            area.protect(libc::PROT_READ);
            assert_eq!(ask(&fd, WRITE, &area, &mirror), Err(libc::EPERM));
            area.protect(libc::PROT_NONE);
            assert_eq!(ask(&fd, READ, &area, &mirror), Err(libc::EFAULT));
            assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Err(libc::EINVAL));
            area.protect(libc::PROT_READ);
            mirror.check(2);
            area.check(1);
        }
        area.protect(libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(ask(&fd, WRITE, &area, &mirror), Ok((64, 1)));
        area.check(2);
    });
}

#[test]
fn exclusive_pages_are_given_back_by_a_touch() {
    under_shim("exclusive_pages_are_given_back_by_a_touch", || {
        let fd = device(1);
        let (area, mirror) = (Area::new(16), Area::new(16));
        assert_eq!(ask(&fd, EXCLUSIVE, &area, &mirror), Ok((16, 0)));
        mirror.check(1);
        assert_eq!(ask(&fd, CHECK_EXCLUSIVE, &area, &mirror), Err(libc::EPERM));
        area.check(1);
        assert!(ask(&fd, CHECK_EXCLUSIVE, &area, &mirror).is_ok());
    });
}

#[test]
fn closing_every_descriptor_loses_nothing() {
    under_shim("closing_every_descriptor_loses_nothing", || {
        let fd = device(0);
        let (area, mirror) = (Area::new(600), Area::new(600));
        assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((600, 0)));
        std::mem::forget(fd);
        // SAFETY: whatever was open is not used any more.
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
        area.check(1);
        let fd = device(0);
        assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((600, 0)));
        area.check(1);
    });
}

#[test]
fn a_chain_of_forks_uses_devices() {
    if !is_privileged() {
        return;
    }
    under_shim("a_chain_of_forks_uses_devices", || {
        fn generation(number: u64, area: &Area, mirror: &Area) {
            area.check(number);
            area.fill(number + 1);
            let fd = device(0);
            let pages = area.pages as u64;
            assert_eq!(ask(&fd, TO_DEVICE, area, mirror), Ok((pages, 0)));
            mirror.check(number + 1);
            if number < 5 {
                waited(forked(|| generation(number + 1, area, mirror)));
            }
            area.check(number + 1);
        }
        generation(1, &Area::new(700), &Area::new(700));
    });
}

#[test]
fn a_child_that_outlives_its_parent_has_its_pages() {
    if !is_privileged() {
        return;
    }
    under_shim("a_child_that_outlives_its_parent_has_its_pages", || {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
        let parent = forked(|| {
            let fd = device(0);
            let (area, mirror) = (Area::new(4000), Area::new(4000));
            assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((4000, 0)));
            forked(|| {
                std::thread::sleep(Duration::from_millis(300));
                area.check(1);
                // SAFETY: the pipe of the test.
                unsafe { libc::write(ends[1], b"y".as_ptr().cast(), 1) };
            });
        });
        waited(parent);
        // SAFETY: as above.
        let answer = unsafe {
            libc::close(ends[1]);
            let mut byte = 0u8;
            (libc::read(ends[0], (&raw mut byte).cast(), 1), byte)
        };
        assert_eq!(answer, (1, b'y'));
    });
}

#[test]
fn threads_fork_and_spawn_while_pages_move() {
    if !is_privileged() {
        return;
    }
    under_shim("threads_fork_and_spawn_while_pages_move", || {
        std::thread::scope(|scope| {
            for unit in 0..2 {
                scope.spawn(move || {
                    let fd = device(unit);
                    let (area, mirror) = (Area::new(300), Area::new(300));
                    for _ in 0..10 {
                        assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((300, 0)));
                        waited(forked(|| area.check(1)));
                        // posix_spawn(3), which is a vfork.
                        assert!(Command::new("/bin/true").status().unwrap().success());
                        area.check(1);
                    }
                });
            }
        });
    });
}

#[test]
fn system_calls_work_on_what_is_on_a_device() {
    if !is_privileged() {
        return;
    }
    under_shim("system_calls_work_on_what_is_on_a_device", || {
        let fd = device(0);
        let (area, mirror) = (Area::new(256), Area::new(256));
        let len = area.pages * PAGE;
        // SAFETY: a file of this test's own; the buffers are as long as said.
        unsafe {
            let file = libc::open(
                c"/var/tmp".as_ptr(),
                libc::O_TMPFILE | libc::O_RDWR | libc::O_DIRECT,
                0o600,
            );
            if file < 0 {
                eprintln!(
                    "SKIPPED {}: no file with O_DIRECT in /var/tmp",
                    module_path!()
                );
                return;
            }
            assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((256, 0)));
            assert_eq!(libc::pwrite(file, area.start.cast(), len, 0), len as isize);
            area.fill(9);
            assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((256, 0)));
            assert_eq!(libc::pread(file, area.start.cast(), len, 0), len as isize);
            area.check(1);
            libc::close(file);
        }
    });
}

/// All of the program's heap is on a device again and again. The C library keeps
/// there what the library's own threads need to find their thread-local data.
#[test]
fn the_whole_heap_may_be_on_a_device() {
    under_shim("the_whole_heap_may_be_on_a_device", || {
        let fd = device(0);
        let mirror = Area::new(64);
        // The arenas of the C library: the main one, and those of threads.
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut heaps = Vec::new();
        for line in maps.lines() {
            let mut fields = line.split_ascii_whitespace();
            let (range, access) = (fields.next().unwrap(), fields.next().unwrap());
            let name = fields.nth(3).unwrap_or("");
            let (from, to) = range.split_once('-').unwrap();
            let [from, to] = [from, to].map(|hex| u64::from_str_radix(hex, 16).unwrap());
            let arena = name.is_empty() && from.is_multiple_of(64 << 20);
            if access == "rw-p" && (name == "[heap]" || arena) {
                heaps.push((from, to));
            }
        }
        assert!(!heaps.is_empty());
        let (mut asked, mut moved) = (0, 0);
        for round in 0..100u64 {
            for &(from, to) in &heaps {
                let mut at = from;
                while at < to {
                    let npages = ((to - at) / PAGE as u64).min(mirror.pages as u64);
                    let mut command = Cmd {
                        addr: at,
                        ptr: mirror.start as u64,
                        npages,
                        ..Cmd::default()
                    };
                    asked += npages;
                    if raw(fd.as_raw_fd(), TO_DEVICE, &raw mut command).is_ok() {
                        moved += command.cpages;
                    }
                    at += npages * PAGE as u64;
                }
            }
            let kept: Vec<Vec<u64>> = (0..50).map(|size| vec![round; size * 7]).collect();
            assert!(kept.iter().flatten().all(|&word| word == round));
        }
        println!("{moved} of {asked} pages of the heap went to the device");
    });
}

/// A pipe holds pages by reference, which nobody can see. The library knows the
/// call: the pages keep what they had when they left.
#[test]
fn a_pipe_keeps_what_was_spliced_into_it() {
    under_shim("a_pipe_keeps_what_was_spliced_into_it", || {
        for open_first in [true, false] {
            let first = open_first.then(|| device(0));
            let (area, other) = (Area::new(16), Area::new(16));
            let (mirror, into) = (Area::new(16), Area::new(16));
            area.fill(4);
            let mut ends = [0; 2];
            // SAFETY: two descriptors, given to owners at once.
            let [output, input] = unsafe {
                assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
                ends.map(|end| OwnedFd::from_raw_fd(end))
            };
            let part = libc::iovec {
                iov_base: area.start.cast(),
                iov_len: area.pages * PAGE,
            };
            // SAFETY: the area outlives what the pipe holds.
            let held = unsafe { libc::vmsplice(input.as_raw_fd(), &raw const part, 1, 0) };
            assert_eq!(held, (area.pages * PAGE) as isize);
            let fd = first.unwrap_or_else(|| device(0));
            assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((16, 0)));
            for round in 5..9 {
                other.fill(round);
                assert_eq!(ask(&fd, TO_DEVICE, &other, &mirror), Ok((16, 0)));
                ask(&fd, TO_SYSTEM, &other, &mirror).unwrap();
                other.check(round);
            }
            // SAFETY: the buffer is as long as said.
            let got = unsafe {
                let to = into.start.cast();
                libc::read(output.as_raw_fd(), to, into.pages * PAGE)
            };
            assert_eq!(got, (into.pages * PAGE) as isize);
            into.check(4);
            area.check(4);
        }
    });
}

/// A device file as the program finds it, without opening it or opened.
#[test]
fn a_device_file_looks_like_one() {
    under_shim("a_device_file_looks_like_one", || {
        let path = c"/dev/hmm_dmirror1".as_ptr();
        // SAFETY: C strings; plain structures that are filled or not used.
        unsafe {
            assert_eq!(libc::access(path, libc::R_OK | libc::W_OK), 0);
            assert_eq!(libc::access(path, libc::X_OK), -1);
            assert_eq!(libc::faccessat(libc::AT_FDCWD, path, libc::F_OK, 0), 0);
            assert_eq!(
                libc::access(c"/dev/hmm_dmirror7".as_ptr(), libc::F_OK),
                -1,
                "a device that is not there"
            );
            let mut at_path = std::mem::zeroed::<libc::stat>();
            assert_eq!(libc::stat(path, &raw mut at_path), 0);
            let fd = device(1);
            let mut opened = std::mem::zeroed::<libc::stat>();
            assert_eq!(libc::fstat(fd.as_raw_fd(), &raw mut opened), 0);
            let mut empty = std::mem::zeroed::<libc::stat>();
            let flags = libc::AT_EMPTY_PATH;
            let done = libc::fstatat(fd.as_raw_fd(), c"".as_ptr(), &raw mut empty, flags);
            assert_eq!(done, 0);
            for status in [at_path, opened, empty] {
                assert_eq!(status.st_mode & libc::S_IFMT, libc::S_IFCHR);
                assert_eq!(libc::minor(status.st_rdev), 1);
            }
            // What is no device is what it was.
            let mut file = std::mem::zeroed::<libc::stat>();
            assert_eq!(libc::stat(c"/proc/self/exe".as_ptr(), &raw mut file), 0);
            assert_eq!(file.st_mode & libc::S_IFMT, libc::S_IFREG);
        }
        // By way of statx(2).
        let kind = std::fs::metadata("/dev/hmm_dmirror0").unwrap().file_type();
        assert!(std::os::unix::fs::FileTypeExt::is_char_device(&kind));
    });
}

/// However the last descriptor goes, the device gives its memory back.
#[test]
fn a_device_that_is_replaced_or_closed_with_others_gives_its_memory_back() {
    under_shim(
        "a_device_that_is_replaced_or_closed_with_others_gives_its_memory_back",
        || {
            let area = Area::new(64);
            let mirror = Area::new(64);
            let seen = |fd: &OwnedFd| {
                let answer = ask(fd, SNAPSHOT, &area, &mirror);
                assert_eq!(answer, Ok((64, 0)));
                // SAFETY: the first byte of the answer.
                unsafe { mirror.start.cast::<u8>().read_volatile() }
            };
            const ON_DEVICE: u8 = 0x20 | 2;
            const AT_HOME: u8 = 2;
            // The other device sees what this one has.
            let witness = device(1);
            let ways: [fn(c_int) -> c_int; 4] = [
                // SAFETY: descriptors of this test's own.
                |fd| unsafe { libc::dup2(0, fd) },
                // SAFETY: as above.
                |fd| unsafe { libc::dup3(0, fd, libc::O_CLOEXEC) },
                // SAFETY: as above.
                |fd| unsafe { libc::close_range(fd.cast_unsigned(), fd.cast_unsigned(), 0) },
                // SAFETY: as above.
                |fd| unsafe { libc::close(fd) },
            ];
            for way in ways {
                let fd = device(0);
                assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((64, 0)));
                assert_eq!(seen(&fd), ON_DEVICE);
                assert_ne!(seen(&witness), AT_HOME);
                // SAFETY: as above.
                let copy = unsafe { libc::dup(fd.as_raw_fd()) };
                let number = std::os::fd::IntoRawFd::into_raw_fd(fd);
                assert!(way(number) >= 0);
                assert_ne!(seen(&witness), AT_HOME, "there is another descriptor");
                assert!(way(copy) >= 0);
                assert_eq!(seen(&witness), AT_HOME);
                area.check(1);
            }
        },
    );
}

/// Handlers of the program's own run while pages move, also such that touch
/// what is on a device; system calls are made without libc.
#[test]
fn signal_handlers_and_raw_system_calls_meet_device_memory() {
    use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
    static WORDS: AtomicPtr<u64> = AtomicPtr::new(ptr::null_mut());
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static WRONG: AtomicU64 = AtomicU64::new(0);

    extern "C" fn look(_: c_int) {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let index = usize::try_from(number).unwrap_or(0) * 4099 % (128 * PAGE / 8);
        // SAFETY: inside of the area, which lives as long as the timer.
        let word = unsafe { WORDS.load(Ordering::Relaxed).add(index).read_volatile() };
        if word != 1000 + index as u64 {
            WRONG.fetch_add(1, Ordering::Relaxed);
        }
    }

    if !is_privileged() {
        return;
    }
    under_shim(
        "signal_handlers_and_raw_system_calls_meet_device_memory",
        || {
            let fd = device(0);
            let (area, mirror) = (Area::new(128), Area::new(128));
            WORDS.store(area.start, Ordering::Relaxed);
            let handler: extern "C" fn(c_int) = look;
            let every = libc::timeval {
                tv_sec: 0,
                tv_usec: 500,
            };
            let timer = libc::itimerval {
                it_interval: every,
                it_value: every,
            };
            // SAFETY: the handler only reads memory and counts.
            unsafe {
                let mut action = std::mem::zeroed::<libc::sigaction>();
                action.sa_sigaction = handler as libc::sighandler_t;
                action.sa_flags = libc::SA_RESTART;
                assert_eq!(
                    libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut()),
                    0
                );
                libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut());
            }
            let file = std::fs::File::open("/dev/zero").unwrap();
            let since = Instant::now();
            let mut rounds = 0;
            while since.elapsed() < Duration::from_secs(2) {
                // ENOENT, as with the driver: a handler has taken pages back
                // before they were read for the caller.
                match ask(&fd, TO_DEVICE, &area, &mirror) {
                    Ok(answer) => {
                        assert_eq!(answer, (128, 0));
                        mirror.check(1);
                    }
                    Err(error) => assert_eq!(error, libc::ENOENT),
                }
                // A raw call into memory of its own on the device, and out of it.
                let other = Area::new(16);
                assert_eq!(ask(&fd, TO_DEVICE, &other, &mirror), Ok((16, 0)));
                let len = other.pages * PAGE;
                // SAFETY: the other area, which nobody refers to.
                let read =
                    unsafe { libc::syscall(libc::SYS_read, file.as_raw_fd(), other.start, len) };
                // A signal makes it a short one.
                assert!(read > 0, "{}", std::io::Error::last_os_error());
                // SAFETY: inside of the area.
                assert_eq!(unsafe { other.start.read_volatile() }, 0);
                // SAFETY: unmaps this test's own pages behind libc's back.
                unsafe { libc::syscall(libc::SYS_munmap, other.start, len) };
                rounds += 1;
            }
            // SAFETY: stops the timer.
            unsafe { libc::setitimer(libc::ITIMER_REAL, &std::mem::zeroed(), ptr::null_mut()) };
            assert!(rounds > 10, "{rounds} rounds");
            let count = COUNT.load(Ordering::Relaxed);
            assert!(count > 100, "{count} signals");
            assert_eq!(WRONG.load(Ordering::Relaxed), 0, "of {count} looks");
        },
    );
}

/// MADV_DONTFORK and MADV_WIPEONFORK on what is on a device.
#[test]
fn what_is_not_for_children_is_kept_from_them() {
    under_shim("what_is_not_for_children_is_kept_from_them", || {
        let fd = device(0);
        let (wiped, hidden) = (Area::new(32), Area::new(32));
        let mirror = Area::new(32);
        let advise = |area: &Area, advice| {
            // SAFETY: this area's own pages.
            let done = unsafe { libc::madvise(area.start.cast(), area.pages * PAGE, advice) };
            assert_eq!(done, 0);
        };
        advise(&wiped, libc::MADV_WIPEONFORK);
        advise(&hidden, libc::MADV_DONTFORK);
        assert_eq!(ask(&fd, TO_DEVICE, &wiped, &mirror), Ok((32, 0)));
        assert_eq!(ask(&fd, TO_DEVICE, &hidden, &mirror), Ok((32, 0)));
        waited(forked(|| {
            for index in 0..wiped.words() {
                // SAFETY: inside of the area.
                assert_eq!(unsafe { wiped.start.add(index).read_volatile() }, 0);
            }
            let mut residency = [0u8; 32];
            // SAFETY: a question about addresses.
            let there = unsafe {
                libc::mincore(
                    hidden.start.cast(),
                    hidden.pages * PAGE,
                    residency.as_mut_ptr(),
                )
            };
            assert_eq!(there, -1, "the child has memory that is not for it");
        }));
        wiped.check(1);
        hidden.check(1);
    });
}

/// The devices whose memory the CPU uses in place.
#[test]
fn coherent_devices_share_with_the_cpu() {
    under_shim("coherent_devices_share_with_the_cpu", || {
        const LOCAL: u8 = 0x40 | 2;
        const REMOTE: u8 = 0x50 | 2;
        let (first, second) = (device(2), device(3));
        let (area, mirror) = (Area::new(32), Area::new(32));
        assert_eq!(ask(&first, TO_DEVICE, &area, &mirror), Ok((32, 0)));
        mirror.check(1);
        area.fill(2);
        assert_eq!(
            ask(&first, READ, &area, &mirror).map(|(pages, _)| pages),
            Ok(32)
        );
        mirror.check(2);
        for (fd, expected) in [(&first, LOCAL), (&second, REMOTE)] {
            assert_eq!(ask(fd, SNAPSHOT, &area, &mirror), Ok((32, 0)));
            // SAFETY: the first byte of the answer.
            let seen = unsafe { mirror.start.cast::<u8>().read_volatile() };
            assert_eq!(seen, expected);
        }
        assert_eq!(ask(&first, TO_SYSTEM, &area, &mirror), Ok((32, 0)));
        assert_eq!(ask(&first, TO_SYSTEM, &area, &mirror), Ok((0, 0)));
        area.check(2);
    });
}

/// What is on a device is swapped out to whoever reads the page map.
#[test]
fn the_page_map_shows_what_is_away() {
    use std::io::{Read, Seek, SeekFrom};
    use std::os::unix::fs::FileExt;
    under_shim("the_page_map_shows_what_is_away", || {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        let fd = device(0);
        let (area, mirror) = (Area::new(8), Area::new(8));
        let mut map = std::fs::File::open("/proc/self/pagemap").unwrap();
        let place = area.start as u64 / PAGE as u64 * 8;
        let mut look = |expected| {
            let mut ways = [[0u8; 64]; 2];
            map.read_exact_at(&mut ways[0], place).unwrap();
            map.seek(SeekFrom::Start(place)).unwrap();
            map.read_exact(&mut ways[1]).unwrap();
            for word in ways.as_flattened().chunks_exact(8) {
                let word = u64::from_ne_bytes(word.try_into().unwrap());
                assert_eq!(word & (PRESENT | SWAPPED), expected);
            }
        };
        look(PRESENT);
        assert_eq!(ask(&fd, TO_DEVICE, &area, &mirror), Ok((8, 0)));
        look(SWAPPED);
        area.check(1);
        look(PRESENT);
    });
}
