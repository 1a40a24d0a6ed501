#!/usr/bin/env bash
# Fills benchmarks/.wheels (ignored by git) with what accelerator.sh needs and a GPU image without internet lacks: the
# project's light dependencies for Python 3.12 on Linux x86-64. What such images have (jax with its CUDA plugin, flax,
# optax, orbax-checkpoint, numpy, scipy, pyarrow, rich, jinja2, pyyaml, tokenizers, safetensors) stays out.
#
#   benchmarks/wheels.sh            # then copy the checkout to the machine, benchmarks/.wheels with it
set -euo pipefail
cd "$(dirname "$0")"
most_mib=60
packages=(
  grain array-record etils cloudpickle portpicker psutil importlib-resources zipp fsspec  # grain and what it imports
  pydantic pydantic-core annotated-types typing-inspection
  tensorboardX protobuf
  llguidance rapidfuzz xxhash httpx2 httpcore2 h11 anyio idna certifi sniffio truststore
  pytest pluggy iniconfig hypothesis sortedcontainers
)
rm -rf .wheels
mkdir -p .wheels
export PIP_CONSTRAINT="$PWD/../constraints.txt"  # the versions that are tested
for package in "${packages[@]}"; do
  # Each by itself: the image's own versions of the others stay as they are.
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 \
    --abi abi3 --abi none --platform manylinux_2_34_x86_64 --platform manylinux_2_31_x86_64 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any -d .wheels "$package" || { echo "wheels.sh: no wheel of $package" >&2; exit 1; }
done
size=$(du -sm .wheels | cut -f1)
echo "$(find .wheels -name "*.whl" | wc -l) wheels, $size MiB in benchmarks/.wheels"
if [ "$size" -gt "$most_mib" ]; then
  echo "wheels.sh: more than $most_mib MiB, which may not travel" >&2
  exit 1
fi
