//! Types, constants and decorations of a module, as far as accesses need them.

use std::collections::{HashMap, HashSet};

use rspirv::spirv::{Decoration, Op, StorageClass};

use crate::module::{Inst, Module};

/// What an id stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    /// An integer or float of so many bytes.
    Scalar {
        bytes: u32,
    },
    Vector {
        component: u32,
        count: u32,
    },
    Matrix {
        column: u32,
        count: u32,
    },
    Array {
        element: u32,
        count: u32,
        stride: u32,
    },
    Struct {
        members: Vec<u32>,
    },
    Pointer {
        class: u32,
        pointee: u32,
    },
    /// Bool, image, void, runtime array and the like.
    Other,
}

/// The types of a module and what decorates them.
#[derive(Debug, Default)]
pub(crate) struct Types {
    types: HashMap<u32, Type>,
    /// Type of every id with one.
    pub(crate) of: HashMap<u32, u32>,
    /// Small constants, for array lengths and access chains.
    constants: HashMap<u32, u32>,
    offsets: HashMap<(u32, u32), u32>,
    /// Each type's size is known once: types may nest without an end in sight.
    sizes: HashMap<u32, u32>,
    matrix_strides: HashMap<(u32, u32), u32>,
    row_major: HashSet<u32>,
    /// Sets of extended instructions that do nothing.
    inert: HashSet<u32>,
}

impl Types {
    pub(crate) fn new(module: &Module) -> Self {
        let mut types = Self::default();
        let mut strides = HashMap::new();
        let mut row_major = Vec::new();
        for inst in &module.preamble {
            let stride = Decoration::ArrayStride as u32;
            let offset = Decoration::Offset as u32;
            match (inst.op, inst.args.as_slice()) {
                (Op::Decorate, &[id, kind, value]) if kind == stride => {
                    strides.insert(id, value);
                }
                (Op::MemberDecorate, &[id, member, kind, value]) if kind == offset => {
                    types.offsets.insert((id, member), value);
                }
                (Op::MemberDecorate, &[id, member, kind, value])
                    if kind == Decoration::MatrixStride as u32 =>
                {
                    types.matrix_strides.insert((id, member), value);
                }
                (Op::MemberDecorate, &[id, _, kind]) if kind == Decoration::RowMajor as u32 => {
                    row_major.push(id);
                }
                _ => {}
            }
        }
        for inst in &module.preamble {
            types.define(inst, &strides);
        }
        // Members may be pointers of types that are declared later.
        for inst in &module.preamble {
            if let Some(size) = types.measure(inst.id) {
                types.sizes.insert(inst.id, size);
            }
        }
        types.spread_row_major(module, &row_major);
        for function in &module.functions {
            let all = std::iter::once(&function.def).chain(&function.params);
            for inst in all.chain(function.insts()) {
                types.of.insert(inst.id, inst.ty);
            }
        }
        types
    }

    fn define(&mut self, inst: &Inst, strides: &HashMap<u32, u32>) {
        let arg = |at: usize| inst.args.get(at).copied().unwrap_or(0);
        let ty = match inst.op {
            Op::TypeInt | Op::TypeFloat => Type::Scalar { bytes: arg(0) / 8 },
            Op::TypeVector => Type::Vector {
                component: arg(0),
                count: arg(1),
            },
            Op::TypeMatrix => Type::Matrix {
                column: arg(0),
                count: arg(1),
            },
            Op::TypeArray => Type::Array {
                element: arg(0),
                count: self.constants.get(&arg(1)).copied().unwrap_or(u32::MAX),
                stride: strides.get(&inst.id).copied().unwrap_or(0),
            },
            Op::TypeStruct => Type::Struct {
                members: inst.args.clone(),
            },
            Op::TypePointer => Type::Pointer {
                class: arg(0),
                pointee: arg(1),
            },
            Op::ExtInstImport => {
                let bytes = inst.args.iter().flat_map(|word| word.to_le_bytes());
                if bytes.take(12).eq(b"NonSemantic.".iter().copied()) {
                    self.inert.insert(inst.id);
                }
                return;
            }
            Op::Constant => {
                self.of.insert(inst.id, inst.ty);
                if inst.args.len() == 1 || arg(1) == 0 {
                    self.constants.insert(inst.id, arg(0));
                }
                return;
            }
            _ => {
                if inst.ty != 0 {
                    self.of.insert(inst.id, inst.ty);
                }
                return;
            }
        };
        self.types.insert(inst.id, ty);
    }

    /// Marks every type that contains a row-major matrix.
    fn spread_row_major(&mut self, module: &Module, direct: &[u32]) {
        for inst in &module.preamble {
            let inner = match self.get(inst.id) {
                Type::Struct { members } => members.iter().any(|&id| self.has_row_major(id)),
                &Type::Array { element, .. } => self.has_row_major(element),
                _ if inst.op == Op::TypeRuntimeArray => {
                    inst.args.first().is_some_and(|&id| self.has_row_major(id))
                }
                _ => false,
            };
            if inner || direct.contains(&inst.id) {
                self.row_major.insert(inst.id);
            }
        }
    }

    /// Whether a type contains a row-major matrix, of which parts do not lie together.
    pub(crate) fn has_row_major(&self, ty: u32) -> bool {
        self.row_major.contains(&ty)
    }

    /// Whether a type is a matrix, or an array of such.
    pub(crate) fn is_matrix(&self, ty: u32) -> bool {
        let mut at = ty;
        while let Type::Array { element, .. } = *self.get(at) {
            at = element;
        }
        matches!(self.get(at), Type::Matrix { .. })
    }

    pub(crate) fn get(&self, ty: u32) -> &Type {
        self.types.get(&ty).unwrap_or(&Type::Other)
    }

    /// Value `new` is a copy of `old`.
    pub(crate) fn copy(&mut self, old: u32, new: u32) {
        if let Some(&ty) = self.of.get(&old) {
            self.of.insert(new, ty);
        }
    }

    /// What a value's type is.
    pub(crate) fn of_value(&self, id: u32) -> &Type {
        self.of.get(&id).map_or(&Type::Other, |&ty| self.get(ty))
    }

    /// Whether a set of extended instructions does nothing.
    pub(crate) fn is_inert(&self, set: u32) -> bool {
        self.inert.contains(&set)
    }

    pub(crate) fn constant(&self, id: u32) -> Option<u32> {
        self.constants.get(&id).copied()
    }

    /// Whether a type is a pointer into physical memory.
    pub(crate) fn is_physical(&self, ty: u32) -> bool {
        matches!(self.get(ty), &Type::Pointer { class, .. }
            if class == StorageClass::PhysicalStorageBuffer as u32)
    }

    /// Whether a value is a pointer into physical memory.
    pub(crate) fn points_to_memory(&self, id: u32) -> bool {
        self.of.get(&id).is_some_and(|&ty| self.is_physical(ty))
    }

    pub(crate) fn pointee(&self, pointer_type: u32) -> Option<u32> {
        match *self.get(pointer_type) {
            Type::Pointer { pointee, .. } => Some(pointee),
            _ => None,
        }
    }

    pub(crate) fn offset(&self, structure: u32, member: u32) -> Option<u32> {
        self.offsets.get(&(structure, member)).copied()
    }

    /// Bytes that a value takes in memory, or `None` if that is not known.
    pub(crate) fn size(&self, ty: u32) -> Option<u32> {
        if self.is_physical(ty) {
            return Some(8);
        }
        self.sizes.get(&ty).copied()
    }

    fn measure(&self, ty: u32) -> Option<u32> {
        match *self.get(ty) {
            Type::Scalar { bytes } => Some(bytes),
            Type::Vector { component, count } => self.size(component)?.checked_mul(count),
            Type::Array { count, stride, .. } => stride.checked_mul(count),
            Type::Struct { ref members } => {
                let mut end = 0;
                for (member, &inner) in (0..).zip(members) {
                    let at = self.offset(ty, member)?;
                    let size = match *self.get(inner) {
                        // A matrix is as large as its structure says: columns or rows.
                        Type::Matrix { column, count } => {
                            let rows = match *self.get(column) {
                                Type::Vector { count, .. } => count,
                                _ => return None,
                            };
                            let stride = *self.matrix_strides.get(&(ty, member))?;
                            stride.checked_mul(count.max(rows))?
                        }
                        _ => self.size(inner)?,
                    };
                    end = end.max(at.checked_add(size)?);
                }
                Some(end)
            }
            Type::Matrix { .. } | Type::Pointer { .. } | Type::Other => None,
        }
    }
}
