//! Two processes share memory, and a device of one of them works on it:
//! `cargo run --release -p hmm --example shared`.
//!
//! The other process needs no engine and knows of no device. It reads and writes its
//! own pointers; what is on the device then comes home first.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use hmm::{ByteCount, Hmm, Pointer, SoftwareOptions, attach};

const NUMBERS: usize = 1 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(path) = std::env::args_os().nth(1) {
        return other_process(&path);
    }
    let hmm = Hmm::open()?;
    let device = hmm.add_software_device(SoftwareOptions::new(ByteCount::mib(64)))?;
    let path = std::env::temp_dir().join(format!("hmm-example-{}", std::process::id()));
    let region = hmm.share(ByteCount::new(8 * NUMBERS as u64), &path)?;
    for index in 0..NUMBERS {
        number(region.as_ptr(), index).store(index as u64, Ordering::Relaxed);
    }

    println!("{}", hmm.migrate(&region, device.id())?);
    let first = Pointer::new(region.as_ptr().cast::<u64>());
    device.launch(NUMBERS / 1024, |context, group| {
        for index in group * 1024..(group + 1) * 1024 {
            context.fetch_add(first.at(index), 1)?;
        }
        Ok(())
    })?;
    println!(
        "all numbers are one more, on the device:\n{}",
        hmm.residency(&region)?
    );

    let status = Command::new(std::env::current_exe()?).arg(&path).status()?;
    println!(
        "after the other process, which {status}:\n{}",
        hmm.residency(&region)?
    );
    let sum: u64 = (0..NUMBERS)
        .map(|index| number(region.as_ptr(), index).load(Ordering::Relaxed))
        .sum();
    let expected = (0..NUMBERS as u64).map(|index| 2 * (index + 1)).sum();
    println!("sum {sum}, expected {expected}");
    drop(region);
    hmm.shutdown()?;
    if sum == expected {
        Ok(())
    } else {
        Err("wrong".into())
    }
}

/// Doubles all numbers.
fn other_process(path: &std::ffi::OsStr) -> Result<(), Box<dyn std::error::Error>> {
    let region = attach(path)?;
    for index in 0..NUMBERS {
        let number = number(region.as_ptr(), index);
        number.store(2 * number.load(Ordering::Relaxed), Ordering::Relaxed);
    }
    Ok(())
}

fn number<'a>(region: *mut u8, index: usize) -> &'a AtomicU64 {
    assert!(index < NUMBERS);
    // SAFETY: the region has so many numbers, is mapped for as long as the example
    // uses it, and all processes use them as atomics only.
    unsafe { AtomicU64::from_ptr(region.cast::<u64>().wrapping_add(index)) }
}
