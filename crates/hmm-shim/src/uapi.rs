//! The driver's interface: `lib/test_hmm_uapi.h` of Linux 7.3.

use std::mem::{offset_of, size_of};

/// `struct hmm_dmirror_cmd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Command {
    /// Address that the device reads or writes.
    pub(crate) addr: u64,
    /// Address that data is copied to or from.
    pub(crate) ptr: u64,
    /// Pages to work on.
    pub(crate) npages: u64,
    /// Pages copied.
    pub(crate) cpages: u64,
    /// Rounds of page faults of the device.
    pub(crate) faults: u64,
}

const _: () = assert!(size_of::<Command>() == 40 && offset_of!(Command, faults) == 32);

/// `_IOWR('H', number, struct hmm_dmirror_cmd)`.
const fn iowr(number: u32) -> u32 {
    const SIZE: u32 = 40;
    const _: () = assert!(SIZE as usize == size_of::<Command>());
    3 << 30 | SIZE << 16 | (b'H' as u32) << 8 | number
}

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read,
    Write,
    MigrateToDevice,
    MigrateToSystem,
    Snapshot,
    Exclusive,
    CheckExclusive,
    Release,
    Flags,
    ReadUnlocked,
}

impl Request {
    /// All of them, in the order of their numbers.
    const ALL: [Self; 10] = [
        Self::Read,
        Self::Write,
        Self::MigrateToDevice,
        Self::MigrateToSystem,
        Self::Snapshot,
        Self::Exclusive,
        Self::CheckExclusive,
        Self::Release,
        Self::Flags,
        Self::ReadUnlocked,
    ];

    /// The request with an ioctl's number. The kernel looks at 32 bits.
    pub(crate) fn from_number(number: libc::c_ulong) -> Option<Self> {
        let number = u32::try_from(number & 0xffff_ffff).ok()?;
        let index = number.checked_sub(iowr(0))?;
        Self::ALL.get(index as usize).copied()
    }
}

/// `HMM_DMIRROR_FLAG_FAIL_ALLOC`: the next allocation fails.
pub(crate) const FLAG_FAIL_ALLOC: u64 = 1;

/// What a snapshot says about a page.
pub(crate) mod prot {
    pub(crate) const ERROR: u8 = 0xff;
    pub(crate) const NONE: u8 = 0x00;
    pub(crate) const READ: u8 = 0x01;
    pub(crate) const WRITE: u8 = 0x02;
    pub(crate) const PMD: u8 = 0x04;
    pub(crate) const PUD: u8 = 0x08;
    pub(crate) const ZERO: u8 = 0x10;
    pub(crate) const DEV_PRIVATE_LOCAL: u8 = 0x20;
    pub(crate) const DEV_COHERENT_LOCAL: u8 = 0x40;
    pub(crate) const DEV_COHERENT_REMOTE: u8 = 0x50;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!(Request::from_number(0xc028_4800), Some(Request::Read));
        assert_eq!(
            Request::from_number(0xc028_4809),
            Some(Request::ReadUnlocked)
        );
        assert_eq!(Request::from_number(0xc028_480a), None);
        assert_eq!(Request::from_number(0xc028_47ff), None);
        assert_eq!(Request::from_number(0), None);
    }
}
