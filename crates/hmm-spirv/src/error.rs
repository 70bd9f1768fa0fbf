//! Why a module is refused.

use rspirv::spirv::{Capability, Op};

/// Why a module is not instrumented. Ids are those of the module as given, as
/// `spirv-dis` shows them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpirvError {
    /// The words are no SPIR-V module.
    #[error("the words are no SPIR-V module: {what} at word {word}")]
    Malformed {
        /// Where.
        word: usize,
        /// What is wrong there.
        what: &'static str,
    },
    /// An instruction contradicts the module around it.
    #[error("{op:?} of id %{id} is invalid: {what}")]
    Invalid {
        /// The instruction.
        op: Op,
        /// Its result, or the id that it names first; 0 if there is none.
        id: u32,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The version of SPIR-V is not one that this pass knows.
    #[error("the module is SPIR-V {major}.{minor}; compile it as 1.3 to 1.6")]
    Version {
        /// Major version.
        major: u8,
        /// Minor version.
        minor: u8,
    },
    /// An opcode that the grammar does not know.
    #[error("opcode {opcode} at word {word} is unknown; it could reach memory unseen")]
    UnknownOpcode {
        /// The number.
        opcode: u16,
        /// Where.
        word: usize,
    },
    /// An instruction that the pass does not handle.
    #[error("{op:?} (id %{id}) is not supported: {why}")]
    Unsupported {
        /// The instruction.
        op: Op,
        /// Its result, or the id that it names first; 0 if there is none.
        id: u32,
        /// What would go wrong, or what to do instead.
        why: &'static str,
    },
    /// A capability that the pass does not handle.
    #[error("capability {0:?} is not supported: it reaches memory, or other shaders, unseen")]
    Capability(Capability),
    /// The module declares another addressing model.
    #[error(
        "addressing model {0} is not PhysicalStorageBuffer64: the kernel has no pointers; \
         run it without instrumentation"
    )]
    AddressingModel(u32),
    /// There is no compute shader in the module.
    #[error("the module has no entry point of the execution model GLCompute")]
    NoComputeEntry,
    /// An access that may lie on two pages and cannot be split.
    #[error(
        "access of {size_bytes} bytes by {op:?} (id %{id}) is aligned to {align_bytes} only: it \
         may lie on two pages; declare a larger buffer_reference_align"
    )]
    Straddles {
        /// The load or store.
        op: Op,
        /// Its result, or the pointer.
        id: u32,
        /// Size of what cannot be split further.
        size_bytes: u32,
        /// Alignment known of it.
        align_bytes: u32,
    },
    /// An access to a whole aggregate with too many parts.
    #[error(
        "{op:?} (id %{id}) moves an aggregate of more than {max} parts at once; copy its members"
    )]
    Aggregate {
        /// The load or store.
        op: Op,
        /// Its result, or the pointer.
        id: u32,
        /// Parts that are allowed.
        max: usize,
    },
    /// A whole aggregate of a type that cannot be split.
    #[error("{op:?} (id %{id}) moves a whole value of type %{ty} that cannot be split: {why}")]
    Unsplittable {
        /// The load or store.
        op: Op,
        /// Its result, or the pointer.
        id: u32,
        /// The type.
        ty: u32,
        /// What stands in the way.
        why: &'static str,
    },
    /// The checked variant runs single invocations again, which forbids that
    /// they wait for each other or exchange values.
    #[error(
        "{op:?} (id %{id}) has invocations work together, so they cannot be run again one by one; \
         there is no checked variant, use the stalling or an unchecked one"
    )]
    Together {
        /// The barrier or subgroup operation.
        op: Op,
        /// Its result; of a barrier the id of its scope.
        id: u32,
    },
    /// A loop whose shape leaves no place for an early return.
    #[error("the loop with header %{header} cannot be left early: {why}")]
    Loop {
        /// Label of the loop's header.
        header: u32,
        /// What stands in the way.
        why: &'static str,
    },
    /// The id of the control block's specialisation constant is taken.
    #[error(
        "specialisation constant {0} is the kernel's own; choose another for the control block"
    )]
    SpecIdTaken(u32),
    /// Too many places at which the stalling variant would poll.
    #[error(
        "{places} accesses and calls would each carry a polling loop, with which drivers take \
         minutes; {max} may: use the checked variant, or loops in place of repeated code"
    )]
    TooManyStalls {
        /// Accesses, parts of accesses, and calls of functions with such.
        places: usize,
        /// How many are allowed.
        max: usize,
    },
    /// The module would grow beyond what SPIR-V allows.
    #[error("the module needs more than {max} ids")]
    TooLarge {
        /// Ids that a module can have.
        max: u32,
    },
}
