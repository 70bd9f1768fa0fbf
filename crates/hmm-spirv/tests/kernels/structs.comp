#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_shader_8bit_storage : require
#extension GL_EXT_shader_16bit_storage : require
// Whole structures, small integers, longs and pointers in memory.
layout(local_size_x = 32) in;
struct Inner { uint8_t small; uint16_t medium; uint64_t large; vec3 place; };
struct Record { uint id; Inner inner[2]; mat2x3 turn; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Records { Record at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Out { Records to; uint64_t total; };
layout(push_constant, scalar) uniform Args { Records from; Out out_; uint count; } args;
void main() {
    uint i = gl_GlobalInvocationID.x;
    if (i >= args.count) return;
    Record record = args.from.at[i];
    record.id += 1;
    record.inner[0].small += uint8_t(1);
    record.inner[1].medium += uint16_t(2);
    record.inner[1].large += 3;
    record.inner[0].place += vec3(1, 2, 3);
    record.turn[1] += record.inner[0].place;
    args.out_.to.at[i] = record;
}
