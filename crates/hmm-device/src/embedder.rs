//! Who keeps a device's memory where it is, and starts its threads.

use std::io;

use hmm_types::PageRange;

/// What a device needs of whoever embeds it.
pub trait Embedder {
    /// Says that this is the device's memory, before anybody can use it. It must
    /// never be migrated until the device is closed, or could not be opened.
    fn exclude(&self, range: PageRange);

    /// The same for what a driver has mapped, or so it seems: what a kernel is given a
    /// pointer to is the program's after all.
    fn exclude_guess(&self, range: PageRange) {
        self.exclude(range);
    }

    /// Says that shared objects have been loaded which stay: neither may the memory of
    /// these migrate. On a thread of the device.
    fn objects_are_loaded(&self) {}

    /// The opposite of excluding, with the very same range: the device has given it up.
    fn include(&self, range: PageRange);

    /// Runs `body` on a thread of this name, whose stack must never be migrated.
    ///
    /// # Errors
    /// When the system has no thread to give.
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Join>>;
}

/// A thread that was started.
pub trait Join: Send {
    /// Waits for its end.
    fn join(self: Box<Self>);
}

/// Plain threads of the standard library, in a process where nothing migrates
/// that was not asked for by name.
#[derive(Clone, Copy, Debug, Default)]
pub struct Standalone;

impl Embedder for Standalone {
    fn exclude(&self, _range: PageRange) {}

    fn include(&self, _range: PageRange) {}

    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Join>> {
        let thread = std::thread::Builder::new().name(name).spawn(body)?;
        Ok(Box::new(thread))
    }
}

impl Join for std::thread::JoinHandle<()> {
    fn join(self: Box<Self>) {
        // A worker that panicked outside of a kernel has said so on stderr.
        let _ = std::thread::JoinHandle::join(*self);
    }
}
