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
