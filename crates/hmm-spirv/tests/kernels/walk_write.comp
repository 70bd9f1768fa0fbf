#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// Increments every node of a chain: not idempotent.
layout(local_size_x = 64) in;
layout(buffer_reference) buffer Node;
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Node { Node next; uint64_t value; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Nodes { Node at[]; };
layout(push_constant, scalar) uniform Args { Nodes heads; uint chains; } args;
void main() {
    uint i = gl_GlobalInvocationID.x;
    if (i >= args.chains) return;
    Node node = args.heads.at[i];
    do {
        node.value += 1;
        node = node.next;
    } while (uint64_t(node) != 0);
}
