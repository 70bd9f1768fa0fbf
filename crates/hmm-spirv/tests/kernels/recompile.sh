#!/bin/sh
# Compiles the kernels; the results are committed, so that tests need no compiler.
# Debian: glslang-tools.
set -eu
cd "$(dirname "$0")"
for source in *.comp; do
    glslangValidator -V --quiet --target-env vulkan1.3 -o "${source%.comp}.spv" "$source"
done
