#!/usr/bin/env bash
# Compiles the examples' shaders, after a change of one. Takes glslang and SPIR-V's tools
# (`cargo xtask vulkan` installs them).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
find . -name '*.comp' | while read -r source; do
    made="${source%.comp}.spv"
    glslangValidator --quiet -V --target-env vulkan1.2 "$source" -o "$made"
    spirv-val --target-env vulkan1.2 "$made"
done
