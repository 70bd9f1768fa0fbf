//! Address translation for SPIR-V kernels.
//!
//! A kernel is written with plain pointers (GLSL with `GL_EXT_buffer_reference`,
//! or anything else that makes `PhysicalStorageBuffer64` pointers of it) that
//! hold addresses of the program. [`instrument`] puts a translation before every
//! load, store and atomic through such a pointer, and nowhere else: pointers are
//! stored, compared and added to as the program sees them. [`analyse`] says what
//! a host must know of a kernel. This crate knows no Vulkan.
//!
//! ```
//! use hmm_spirv::{Options, SpirvError, Variant, instrument};
//!
//! let options = Options { variant: Variant::Checked, control_spec_id: 1000 };
//! // Words from a compiler; here, from nowhere.
//! let refused = instrument(&[0; 5], options);
//! assert!(matches!(refused, Err(SpirvError::Malformed { word: 0, .. })));
//! ```
//!
//! # What is inserted
//! `words.at[i] += 1`, checked ([`Variant::Checked`]), in pseudo code:
//!
//! ```text
//! before                      after
//! value = *pointer            if (pointer & slot.mask) != slot.read {
//!                                 entry = walk the table for pointer
//!                                 slot = entry's page, rights and delta
//!                                 if entry is not readable {
//!                                     dead = true; fault = pointer | read
//!                                     return
//!                                 }
//!                             }
//!                             value = *(pointer + slot.delta)
//! *pointer = value + 1        (the same with slot.write)
//! ```
//!
//! * A **slot** is a TLB entry in Private variables. Pointers that come from the
//!   same variable or member of the push constants share one. It holds 64 KiB
//!   where the table says that these lie together, else a page.
//! * The **entry point** is wrapped: the table's address and the like are read
//!   once; a checked invocation whose done bit is set is not run; one that gave up
//!   logs its fault and counts itself, any other sets its done bit.
//! * After a **call** of a function that may give up, the caller returns as well.
//! * Every round of a **loop** burns fuel; who has none left looks whether the
//!   host wants it to stop.
//! * [`Variant::Stall`] calls a function in place of the above, which asks the
//!   table until no invocation of the subgroup misses; who misses logs it and
//!   polls. Unchecked variants add, mask or walk in line.
//! * `NumWorkgroups` becomes a variable set from the control block, because a
//!   launch may be several dispatches.
//!
//! The control block ([`control`]) is found by a 64-bit specialisation constant,
//! the page table ([`table`]) through the control block.
//!
//! # What control flow has to bear
//! An access in a loop's continue construct could not return. That construct
//! becomes part of the body, in a copy for each block that continues, and a new,
//! empty one follows. The code of a loop's header moves into a block of its own.
//! Drivers nest what follows a return; beyond 24 places that may return, each
//! function is put into a loop of one round, because lavapipe ignores conditions
//! beyond 80 levels.
//!
//! # Accesses that lie on two pages
//! An access is one if it is no larger than its `Aligned` operand. Any other is
//! split into members, elements and components that are, up to 64; a checked
//! store translates all of them before it writes the first. A matrix is split
//! into columns, whose distance its pointer alone does not tell.
//!
//! # Running again
//! [`KernelInfo::may_fault_after_write`] tells whether any path of control flow,
//! calls included, leads from a write (to memory, a storage buffer or an image; not
//! to workgroup memory) to an access. Two accesses to one address count: after
//! `a[i] += 1; a[i] += 1;` it is `true`. So is it for a store in a loop.
//!
//! # Refused
//! Modules without physical pointers (run these as they are), entry points that
//! are no compute shaders, other versions than 1.3 to 1.6, opcodes that are
//! unknown or may reach memory unseen (OpCopyMemory and extended instructions on
//! physical pointers, pointer comparison, cooperative matrices, ray tracing,
//! function and untyped pointers), vectors and aggregates with row-major matrices,
//! what straddles pages and cannot be split, and recursion. Checked: barriers and
//! subgroup operations. Stall: more than 48 places that would poll. Each
//! [`SpirvError`] names the instruction.
//!
//! # Limits
//! * A module is taken to be valid; [`instrument`] does not replace `spirv-val`.
//!   It neither panics nor hangs on one that is not.
//! * Source lines (OpLine) in functions are dropped.
//! * The stalling variant counts subgroups. On a device whose invocations of one
//!   subgroup progress apart from each other, one subgroup may park twice.
//! * A kernel with barriers whose invocations give up (stop, or a stall's bound)
//!   leaves the others waiting where a device does not count who has ended.
#![forbid(unsafe_code)]

mod access;
mod analyse;
mod build;
mod check;
mod contract;
mod entry;
mod error;
mod flat;
mod grammar;
mod instrument;
mod module;
mod reach;
mod rewrite;
mod runtime;
mod stall;
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
