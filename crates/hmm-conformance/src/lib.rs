//! What every device has to show (`docs/writing-a-device.md`), as tests that each of them
//! runs: [`conformance_tests!`] makes them for a device that can be opened as a
//! [`Subject`].
//!
//! The engine here is a small one: each page is at home or in a frame, under a lock of
//! its own. It knows what every page should hold, so it sees what a device loses.

mod engine;
mod memory;
mod subject;
pub mod suite;

pub use engine::{Engine, ID};
pub use memory::Mapped;
pub use subject::{Failure, Operation, Setting, Subject};

/// Makes a test of each item of the suite. `$open` is a function that opens the device
/// with a [`Setting`], or says why it cannot be had here.
#[macro_export]
macro_rules! conformance_tests {
    ($open:path) => {
        $crate::conformance_tests!($open:
            every_operation_is_right,
            faults_bring_pages_and_waiting_is_bounded,
            data_survives_while_pages_come_and_go,
            nothing_is_written_after_unmap,
            a_working_set_larger_than_memory_works,
            errors_of_accesses_end_the_kernel,
            mapping_replaces_and_lowers_rights,
            frames_are_handed_out_once,
            full_memory_is_an_error,
            failing_maps_leave_nothing_mapped,
            failing_copies_are_told_once,
            copies_are_whole,
            a_lost_device_says_so,
            a_device_that_is_lost_in_a_kernel_ends_it,
            closing_ends_kernels_and_calls
        );
    };
    ($open:path: $($name:ident),*) => {
        $(
            #[test]
            fn $name() {
                match $open($crate::suite::setting_of(stringify!($name))) {
                    Ok(subject) => $crate::suite::$name(subject),
                    Err(reason) => eprintln!("SKIPPED {}: {reason}", module_path!()),
                }
            }
        )*
    };
}
