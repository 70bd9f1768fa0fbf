#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// Forty accesses in a row: each could be the last of the invocation.
layout(local_size_x = 64) in;
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Words { uint at[]; };
layout(push_constant, scalar) uniform Args { Words data; Words results; uint count; } args;
void main() {
    uint i = gl_GlobalInvocationID.x;
    if (i >= args.count) return;
    uint sum = 0;
    sum += args.data.at[(i * 1 + 0) % args.count];
    sum += args.data.at[(i * 3 + 977) % args.count];
    sum += args.data.at[(i * 5 + 1954) % args.count];
    sum += args.data.at[(i * 7 + 2931) % args.count];
    sum += args.data.at[(i * 9 + 3908) % args.count];
    sum += args.data.at[(i * 11 + 4885) % args.count];
    sum += args.data.at[(i * 13 + 5862) % args.count];
    sum += args.data.at[(i * 15 + 6839) % args.count];
    sum += args.data.at[(i * 17 + 7816) % args.count];
    sum += args.data.at[(i * 19 + 8793) % args.count];
    sum += args.data.at[(i * 21 + 9770) % args.count];
    sum += args.data.at[(i * 23 + 10747) % args.count];
    sum += args.data.at[(i * 25 + 11724) % args.count];
    sum += args.data.at[(i * 27 + 12701) % args.count];
    sum += args.data.at[(i * 29 + 13678) % args.count];
    sum += args.data.at[(i * 31 + 14655) % args.count];
    sum += args.data.at[(i * 33 + 15632) % args.count];
    sum += args.data.at[(i * 35 + 16609) % args.count];
    sum += args.data.at[(i * 37 + 17586) % args.count];
    sum += args.data.at[(i * 39 + 18563) % args.count];
    sum += args.data.at[(i * 41 + 19540) % args.count];
    sum += args.data.at[(i * 43 + 20517) % args.count];
    sum += args.data.at[(i * 45 + 21494) % args.count];
    sum += args.data.at[(i * 47 + 22471) % args.count];
    sum += args.data.at[(i * 49 + 23448) % args.count];
    sum += args.data.at[(i * 51 + 24425) % args.count];
    sum += args.data.at[(i * 53 + 25402) % args.count];
    sum += args.data.at[(i * 55 + 26379) % args.count];
    sum += args.data.at[(i * 57 + 27356) % args.count];
    sum += args.data.at[(i * 59 + 28333) % args.count];
    sum += args.data.at[(i * 61 + 29310) % args.count];
    sum += args.data.at[(i * 63 + 30287) % args.count];
    sum += args.data.at[(i * 65 + 31264) % args.count];
    sum += args.data.at[(i * 67 + 32241) % args.count];
    sum += args.data.at[(i * 69 + 33218) % args.count];
    sum += args.data.at[(i * 71 + 34195) % args.count];
    sum += args.data.at[(i * 73 + 35172) % args.count];
    sum += args.data.at[(i * 75 + 36149) % args.count];
    sum += args.data.at[(i * 77 + 37126) % args.count];
    sum += args.data.at[(i * 79 + 38103) % args.count];
    args.results.at[i] = sum;
}
