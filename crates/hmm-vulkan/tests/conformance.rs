//! The Vulkan device shows what every device has to, with checked kernels, with stalling
//! ones, and with copies by the device's queue.

mod common;

mod checked {
    use hmm_conformance::Setting;
    use hmm_vulkan::Variant;

    use crate::common::Tested;

    fn open(setting: Setting) -> Result<&'static Tested, String> {
        Tested::open(setting, Variant::Checked, |_| ())
    }

    hmm_conformance::conformance_tests!(open);
}

mod stalling {
    use hmm_conformance::Setting;
    use hmm_vulkan::Variant;

    use crate::common::Tested;

    fn open(setting: Setting) -> Result<&'static Tested, String> {
        Tested::open(setting, Variant::Stall, |_| ())
    }

    hmm_conformance::conformance_tests!(open);
}

/// As on a GPU: memory is the driver's, and its queue copies.
mod by_queue {
    use hmm_conformance::Setting;
    use hmm_vulkan::{Copies, Variant};

    use crate::common::Tested;

    fn open(setting: Setting) -> Result<&'static Tested, String> {
        Tested::open(setting, Variant::Checked, |config| {
            config.copies = Copies::Queue;
            config.own_memory = false;
        })
    }

    hmm_conformance::conformance_tests!(open);
}

/// The same, with memory in place and with copies that are imported.
mod importing {
    use hmm_conformance::Setting;
    use hmm_vulkan::{Copies, Variant};

    use crate::common::Tested;

    fn open(setting: Setting) -> Result<&'static Tested, String> {
        Tested::open(setting, Variant::Checked, |config| {
            config.copies = Copies::QueueImports;
            config.own_memory = false;
            config.import_memory = true;
        })
    }

    hmm_conformance::conformance_tests!(open);
}
