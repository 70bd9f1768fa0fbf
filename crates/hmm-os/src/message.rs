//! What the kernel's messages say.

use std::os::fd::RawFd;

use hmm_hal::{Event, FaultKind, SpaceId};
use hmm_types::{Access, PageRange, VirtAddr};
use linux_raw_sys::general as raw;

use crate::abi::uffd_msg;
use crate::fatal::fail;

/// A message in the engine's words.
pub(crate) enum Message {
    /// An event to pass on.
    Event(Event),
    /// The space forked; the descriptor is the child's context, and the
    /// reader's to close.
    Fork(RawFd),
}

/// Translates one message of the context of `space`; `None` for a kind that
/// was not asked for.
pub(crate) fn translate(space: SpaceId, message: &uffd_msg) -> Option<Message> {
    let argument = message.arg;
    let event = match u32::from(message.event) {
        raw::UFFD_EVENT_PAGEFAULT => {
            // SAFETY: the variant that this event fills; all are plain numbers.
            let fault = unsafe { argument.pagefault };
            let flag = |bit: u32| fault.flags & u64::from(bit) != 0;
            Event::Fault {
                space,
                address: VirtAddr::new(fault.address),
                kind: if flag(raw::UFFD_PAGEFAULT_FLAG_WP) {
                    FaultKind::WriteProtected
                } else {
                    FaultKind::Missing
                },
                access: if flag(raw::UFFD_PAGEFAULT_FLAG_WRITE) {
                    Access::Write
                } else {
                    Access::Read
                },
                // SAFETY: the union has this one variant.
                thread: unsafe { fault.feat.ptid },
            }
        }
        raw::UFFD_EVENT_FORK => {
            // SAFETY: the variant that this event fills.
            let number = unsafe { argument.fork.ufd };
            return Some(Message::Fork(number.cast_signed()));
        }
        raw::UFFD_EVENT_REMAP => {
            // SAFETY: the variant that this event fills.
            let remap = unsafe { argument.remap };
            Event::Remap {
                space,
                from: range(remap.from, remap.len),
                to: VirtAddr::new(remap.to),
            }
        }
        raw::UFFD_EVENT_REMOVE => {
            // SAFETY: the variant that this event fills.
            let remove = unsafe { argument.remove };
            Event::Remove {
                space,
                range: range(remove.start, remove.end.wrapping_sub(remove.start)),
            }
        }
        raw::UFFD_EVENT_UNMAP => {
            // SAFETY: the variant that this event fills.
            let unmap = unsafe { argument.remove };
            Event::Unmap {
                space,
                range: range(unmap.start, unmap.end.wrapping_sub(unmap.start)),
            }
        }
        _ => return None,
    };
    Some(Message::Event(event))
}

fn range(start: u64, len_bytes: u64) -> PageRange {
    match PageRange::new(VirtAddr::new(start), len_bytes) {
        Ok(range) => range,
        Err(error) => fail(format_args!(
            "the kernel reported a change of memory that cannot be: {error}; \
             page tables would be wrong from here on, so the process ends now"
        )),
    }
}
