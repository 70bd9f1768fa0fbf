#version 460
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

// Follows pointers until one is null: in a ring, for ever.
layout(local_size_x = 1) in;

layout(buffer_reference) buffer Node;
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Node { Node next; };
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Word { uint64_t value; };
layout(push_constant, scalar) uniform Start { Node first; Word steps; } start;

void main() {
    uint64_t steps = 0;
    for (Node node = start.first; uint64_t(node) != 0; node = node.next) {
        steps++;
    }
    start.steps.value = steps;
}
