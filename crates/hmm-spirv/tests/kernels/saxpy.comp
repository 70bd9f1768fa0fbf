#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// y = a * x + y into z: does not fault after it has written.
layout(local_size_x = 64) in;
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Floats { float at[]; };
layout(push_constant, scalar) uniform Args { Floats x; Floats y; Floats z; float a; uint count; } args;
void main() {
    for (uint i = gl_GlobalInvocationID.x; i < args.count; i += gl_NumWorkGroups.x * 64) {
        args.z.at[i] = args.a * args.x.at[i] + args.y.at[i];
    }
}
