//! What an owner and its peers say to each other, over a Unix stream socket.
//!
//! | from | what | descriptor |
//! |---|---|---|
//! | owner | `HELLO`, length in bytes | the memfd |
//! | peer | `HELLO`, start of its mapping | its userfaultfd |
//! | owner | `READY`, 0: from now on the owner serves the peer's faults | |
//! | owner | `BYE`, 0: everything is home, and stays there | |

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Also says which version of this both sides speak.
pub(super) const HELLO: u64 = u64::from_le_bytes(*b"hmm-sh 1");
pub(super) const READY: u64 = u64::from_le_bytes(*b"hmm-redy");
pub(super) const BYE: u64 = u64::from_le_bytes(*b"hmm-bye.");

/// Sends a message.
pub(super) fn send(
    stream: &UnixStream,
    kind: u64,
    value: u64,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&value.to_le_bytes());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(descriptor) = &descriptor {
        control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(
            descriptor,
        )));
    }
    // So small a message goes at once or not at all.
    let sent = sendmsg(
        stream.as_fd(),
        &[IoSlice::new(&bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Waits for a message of this kind: its value, and the descriptor that came with
/// it.
pub(super) fn receive(stream: &UnixStream, kind: u64) -> io::Result<(u64, Option<OwnedFd>)> {
    let mut bytes = [0; 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream.as_fd(),
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    match received.bytes {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        16 if word(0) == kind => Ok((word(8), descriptor)),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the other side speaks another version of the library, or is none of its",
        )),
    }
}
