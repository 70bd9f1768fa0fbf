//! Address translation for SPIR-V kernels (to be documented).
#![forbid(unsafe_code)]

mod access;
mod analyse;
mod build;
mod check;
mod contract;
mod entry;
mod error;
mod grammar;
mod instrument;
mod module;
mod reach;
mod rewrite;
mod runtime;
mod structure;
mod types;
mod validate;

pub use analyse::{EntryPoint, KernelInfo, analyse};
pub use contract::{Variant, control, table};
pub use error::SpirvError;
pub use instrument::{Instrumented, Options, instrument};
pub use rspirv::spirv::{Capability, Op};

/// Reads a module and refuses functions that call themselves.
fn read(words: &[u32]) -> Result<module::Module, SpirvError> {
    let module = module::Module::parse(words)?;
    if let Some(id) = reach::recursive(&module) {
        return Err(SpirvError::Unsupported {
            op: Op::Function,
            id,
            why: "it calls itself, which shaders must not",
        });
    }
    Ok(module)
}
