#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// Every invocation writes where a pointer leads to, and does not read there.
layout(local_size_x = 64) in;
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Long { uint64_t value; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Longs { Long at[]; };
layout(push_constant, scalar) uniform Args { Longs pointers; uint count; } args;
void main() {
    uint i = gl_GlobalInvocationID.x;
    if (i >= args.count) return;
    args.pointers.at[i].value = i + 1;
}
