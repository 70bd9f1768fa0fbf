//! Whether a change of mappings is under way can be asked without reading it.

use hmm_hal::AddressSpace;
use hmm_os::{EngineThreads, LinuxSpace, OpenConfig};
use hmm_types::{PAGE_SIZE, PageRange, VirtAddr};

#[test]
fn a_space_is_quiet_until_something_changes_and_after_that_was_read() {
    let threads = EngineThreads::start().expect("threads");
    let Ok(space) = threads.run_on_root(|| LinuxSpace::open(OpenConfig::default())) else {
        println!("skipped: userfaultfd is not available");
        return;
    };
    let space: &'static LinuxSpace = hmm_mem::leaked(space);
    // SAFETY: a fresh mapping.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            1 << 20,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    let range = PageRange::new(VirtAddr::of(memory), 1 << 20).expect("pages");
    threads
        .run_on_root(|| space.register(range))
        .expect("register");
    assert!(threads.run_on_root(|| space.is_quiet()));
    let address = memory.addr();
    let unmapper = std::thread::spawn(move || {
        // SAFETY: nobody uses the mapping any more.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(address), 1 << 20) }
    });
    while threads.run_on_root(|| space.is_quiet()) {
        std::thread::yield_now();
    }
    threads.run_on_root(|| while space.read_event().is_none() {});
    assert_eq!(unmapper.join().expect("joins"), 0);
    assert!(threads.run_on_root(|| space.is_quiet()));
    assert!(range.bytes().get() >= PAGE_SIZE);
}
