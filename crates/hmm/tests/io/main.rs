//! I/O in flight: the kernel, devices and other processes read and write memory
//! while it is on a device, or while it moves out and home all the time. The
//! data is right, or the page did not move and the report says why; never zeros,
//! never what was there before.
//!
//! For an ordinary user system calls on pages that are away fail with EFAULT
//! (docs/limits.md): there the memory is touched first, or the call is made
//! again.

#[path = "../common/mod.rs"]
mod common;
mod debugger;
mod direct;
mod held;
mod moving;
mod peer;
mod pipes;
mod ring;

use std::ffi::CString;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{
    HUGE, Map, PAGE, Rng, WORDS, adds_up, all_free, engine, engine_of, fetch, fork, nothing_staged,
    on_device, pattern, send, wait, watchdog,
};
use direct::*;
use hmm::{Builder, Hmm, PageRange, Pointer, Report, SoftwareDevice, StayReason};
use moving::*;
use peer::*;
use pipes::*;
