//! Measures the device against the processor's own accesses and the C
//! library's copies, and prints ratios: `cargo run --release --example speed`.

use std::hint::black_box;
use std::ptr;
use std::time::{Duration, Instant};

use hmm_hal::{Device, DeviceFaultError, FaultHandler, Resolution, Transfer};
use hmm_soft::{SoftConfig, SoftDevice};
use hmm_types::{Access, ByteCount, DeviceId, FrameRange, PageCount, PageRange, VirtAddr};

const BYTES: usize = 256 << 20;
const ROUNDS: usize = 5;
const HOPS: usize = 2_000_000;

/// Everything is mapped before, so that a fault is a mistake.
struct NoFaults;

impl FaultHandler for NoFaults {
    fn device_fault(
        &self,
        _: DeviceId,
        address: VirtAddr,
        _: Access,
    ) -> Result<Resolution, DeviceFaultError> {
        Err(DeviceFaultError::NotMapped { address })
    }

    fn wait_for_progress(&self) {}
}

fn pages_of(bytes: usize) -> PageCount {
    PageCount::from(bytes / 4096)
}

/// Memory aligned to 2 MiB with huge pages, as the device's own is.
fn huge(bytes: usize) -> *mut u8 {
    let align = 2 << 20;
    // SAFETY: a fresh mapping touches nothing that exists; the aligned part
    // lies in it.
    unsafe {
        let base = libc::mmap(
            ptr::null_mut(),
            bytes + align,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert!(base != libc::MAP_FAILED);
        base.expose_provenance();
        let base = base
            .cast::<u8>()
            .wrapping_add(base.cast::<u8>().align_offset(align));
        libc::madvise(base.cast(), bytes, libc::MADV_HUGEPAGE);
        ptr::write_bytes(base, 1, bytes);
        base
    }
}

fn best(mut once: impl FnMut() -> Duration) -> Duration {
    (0..ROUNDS).map(|_| once()).min().unwrap_or_default()
}

fn gb_per_s(time: Duration) -> f64 {
    BYTES as f64 / time.as_secs_f64() / 1e9
}

struct Bench {
    device: &'static SoftDevice,
    host: *mut u8,
    range: PageRange,
    frames: FrameRange,
}

impl Bench {
    fn upload(&self) {
        let host = self.range.start();
        let frames = self.frames;
        let fence = self.device.submit(&[Transfer::ToDevice { host, frames }]);
        self.device
            .wait(fence.expect("the copy is done"))
            .expect("it succeeded");
    }

    fn launch(&self, kernel: impl Fn(&hmm_soft::Context) + Sync) -> Duration {
        let start = Instant::now();
        self.device
            .launch(1, |context, _| {
                kernel(context);
                Ok(())
            })
            .expect("the kernel succeeds");
        start.elapsed()
    }

    /// One word of every line links to the next in random order.
    fn chase(&self) {
        let lines = BYTES / 64;
        let mut order: Vec<u32> = (0..u32::try_from(lines).expect("fits")).collect();
        let mut random = 1u64;
        for index in (1..lines).rev() {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            order.swap(
                index,
                usize::try_from(random >> 33).expect("fits") % (index + 1),
            );
        }
        let line = |index: u32| self.host.wrapping_add(index as usize * 64);
        for pair in order
            .windows(2)
            .chain([[order[lines - 1], order[0]].as_slice()])
        {
            // SAFETY: lines lie in the mapping, and nobody else uses it now.
            unsafe { line(pair[0]).cast::<*const u8>().write(line(pair[1])) };
        }
        self.upload();
        let start = line(order[0]).expose_provenance();
        let direct = best(|| {
            let begin = Instant::now();
            let mut at = ptr::with_exposed_provenance::<u8>(start);
            for _ in 0..HOPS {
                // SAFETY: links lead to lines of the mapping.
                at = unsafe { at.cast::<*const u8>().read_volatile() };
            }
            black_box(at);
            begin.elapsed()
        });
        let device = best(|| {
            self.launch(|context| {
                let mut at = ptr::with_exposed_provenance::<u8>(start);
                for _ in 0..HOPS {
                    at = context.load(at.cast::<*const u8>()).expect("mapped");
                }
                black_box(at);
            })
        });
        let each = |time: Duration| time.as_secs_f64() * 1e9 / HOPS as f64;
        println!(
            "pointer chase: direct {:.1} ns, device {:.1} ns, ratio {:.2}",
            each(direct),
            each(device),
            direct.as_secs_f64() / device.as_secs_f64()
        );
    }

    fn streams(&self) {
        let base = self.host.expose_provenance();
        const CHUNK: usize = 2048;
        let chunks = || {
            let words = ptr::with_exposed_provenance_mut::<u64>(base);
            (0..BYTES / 8 / CHUNK).map(move |chunk| words.wrapping_add(chunk * CHUNK))
        };
        let direct = best(|| {
            let begin = Instant::now();
            let mut buffer = [0u64; CHUNK];
            for at in chunks() {
                // SAFETY: chunks lie in the mapping.
                unsafe { ptr::copy_nonoverlapping(at.cast_const(), buffer.as_mut_ptr(), CHUNK) };
                black_box(&buffer);
            }
            begin.elapsed()
        });
        let on_stack = best(|| {
            self.launch(|context| {
                let mut buffer = [0u64; CHUNK];
                for at in chunks() {
                    context
                        .read_slice(at.cast_const(), &mut buffer)
                        .expect("mapped");
                    black_box(&buffer);
                }
            })
        });
        let on_heap = best(|| {
            self.launch(|context| {
                let mut buffer = vec![0u64; CHUNK];
                for at in chunks() {
                    context
                        .read_slice(at.cast_const(), &mut buffer)
                        .expect("mapped");
                    black_box(&buffer);
                }
            })
        });
        let ratio = |time: Duration| direct.as_secs_f64() / time.as_secs_f64();
        println!(
            "read_slice:    direct {:.2} GB/s, device {:.2} GB/s (stack) {:.2} GB/s (heap), \
             ratios {:.2} {:.2}",
            gb_per_s(direct),
            gb_per_s(on_stack),
            gb_per_s(on_heap),
            ratio(on_stack),
            ratio(on_heap)
        );
        let direct = best(|| {
            let begin = Instant::now();
            let buffer = black_box([1u64; CHUNK]);
            for at in chunks() {
                // SAFETY: chunks lie in the mapping.
                unsafe { ptr::copy_nonoverlapping(buffer.as_ptr(), at, CHUNK) };
            }
            begin.elapsed()
        });
        let device = best(|| {
            self.launch(|context| {
                let buffer = black_box([1u64; CHUNK]);
                for at in chunks() {
                    context.write_slice(at, &buffer).expect("mapped");
                }
            })
        });
        println!(
            "write_slice:   direct {:.2} GB/s, device {:.2} GB/s, ratio {:.2}",
            gb_per_s(direct),
            gb_per_s(device),
            direct.as_secs_f64() / device.as_secs_f64()
        );
        let words = ptr::with_exposed_provenance_mut::<u64>(base);
        let direct = best(|| {
            let begin = Instant::now();
            let mut sum = 0u64;
            for index in 0..BYTES / 8 {
                // SAFETY: the index lies in the mapping.
                sum = sum.wrapping_add(unsafe { words.wrapping_add(index).read_volatile() });
            }
            black_box(sum);
            begin.elapsed()
        });
        let device = best(|| {
            self.launch(|context| {
                let words = ptr::with_exposed_provenance::<u64>(base);
                let mut sum = 0u64;
                for index in 0..BYTES / 8 {
                    sum =
                        sum.wrapping_add(context.load(words.wrapping_add(index)).expect("mapped"));
                }
                black_box(sum);
            })
        });
        println!(
            "load by load:  direct {:.2} GB/s, device {:.2} GB/s, ratio {:.2}",
            gb_per_s(direct),
            gb_per_s(device),
            direct.as_secs_f64() / device.as_secs_f64()
        );
    }

    fn copies(&self) {
        let other = huge(BYTES);
        let memcpy = best(|| {
            let begin = Instant::now();
            // SAFETY: two mappings of that size.
            unsafe { ptr::copy_nonoverlapping(self.host.cast_const(), other, BYTES) };
            begin.elapsed()
        });
        println!("memcpy of 256 MiB: {:.2} GB/s", gb_per_s(memcpy));
        for (name, piece) in [
            ("2 MiB", 2 << 20),
            ("256 KiB", 256 << 10),
            ("64 KiB", 64 << 10),
            ("4 KiB", 4096),
        ] {
            for to_device in [true, false] {
                let time = best(|| {
                    let begin = Instant::now();
                    for index in 0..BYTES / piece {
                        let pages = u32::try_from(piece / 4096).expect("fits");
                        let first = u32::try_from(index).expect("fits") * pages;
                        let frames = self.frames.slice(first, pages);
                        let host = self.range.start().plus_pages(u64::from(first));
                        let transfer = if to_device {
                            Transfer::ToDevice { host, frames }
                        } else {
                            Transfer::ToHost { host, frames }
                        };
                        let fence = self.device.submit(&[transfer]).expect("the copy is done");
                        self.device.wait(fence).expect("it succeeded");
                    }
                    begin.elapsed()
                });
                println!(
                    "  pieces of {name:>7} {}: {:.2} GB/s, ratio {:.2}",
                    if to_device { "to device" } else { "to host  " },
                    gb_per_s(time),
                    memcpy.as_secs_f64() / time.as_secs_f64()
                );
            }
        }
    }

    fn shootdowns(&self) {
        let frames = self.frames;
        let time = |count: u32| {
            let begin = Instant::now();
            for index in 0..count {
                let page = self.range.slice(u64::from(index), 1);
                self.device.unmap(page);
                self.device
                    .map(page, frames.slice(index, 1), Access::Write)
                    .expect("mapped");
            }
            begin.elapsed().as_secs_f64() * 1e6 / f64::from(count)
        };
        let idle = time(10_000);
        let stop = std::sync::atomic::AtomicBool::new(false);
        let base = self.host.expose_provenance();
        let busy = std::thread::scope(|scope| {
            scope.spawn(|| {
                self.launch(|context| {
                    let at = ptr::with_exposed_provenance::<u64>(base).wrapping_add(BYTES / 16);
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        black_box(context.load(at).expect("mapped"));
                    }
                });
            });
            std::thread::sleep(Duration::from_millis(20));
            let busy = time(10_000);
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            busy
        });
        println!("unmap + map of a page: idle {idle:.2} us, with a kernel running {busy:.2} us");
        let pages = PageCount::new(512);
        let begin = Instant::now();
        for _ in 0..1000 {
            self.device
                .unmap(PageRange::from_pages(self.range.start(), pages));
            self.device
                .map(
                    PageRange::from_pages(self.range.start(), pages),
                    frames.slice(0, 512),
                    Access::Write,
                )
                .expect("mapped");
        }
        println!(
            "unmap + map of 2 MiB: {:.2} us",
            begin.elapsed().as_secs_f64() * 1e3
        );
    }
}

// SAFETY: the host pointer is used by one thread at a time, as each measurement
// is waited for.
unsafe impl Sync for Bench {}

fn main() {
    let mut config = SoftConfig::new(ByteCount::new(BYTES as u64));
    config.populate = true;
    config.membarrier = std::env::args().nth(1).as_deref() != Some("fences");
    let device = SoftDevice::open(config).expect("a device");
    device
        .attach(DeviceId::new(0), &NoFaults)
        .expect("not attached yet");
    let host = huge(BYTES);
    let range = PageRange::from_pages(VirtAddr::of(host), pages_of(BYTES));
    let begin = Instant::now();
    let frames = device.allocate(pages_of(BYTES)).expect("all of it is free");
    println!("allocating {frames:?}: {:?}", begin.elapsed());
    assert_eq!(frames.pages(), pages_of(BYTES));
    device.map(range, frames, Access::Write).expect("mapped");
    println!("fences instead of membarrier: {}", device.uses_fences());
    let bench = Bench {
        device,
        host,
        range,
        frames,
    };
    bench.chase();
    bench.streams();
    bench.copies();
    bench.shootdowns();
    println!("{:?}", device.stats());
    device.close();
}
