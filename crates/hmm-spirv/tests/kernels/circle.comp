#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
// Follows pointers, and does not end where they go round in a circle. Every round has
// an access.
layout(local_size_x = 64) in;
layout(buffer_reference) buffer Node;
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Node { Node next; };
layout(push_constant, scalar) uniform Args { Node first; } args;
void main() {
    Node at = args.first;
    while (uint64_t(at) != 0) at = at.next;
    args.first.next = at;
}
