#!/usr/bin/env bash
# Collect the wheels that `make gpu` needs on a machine without a network: tools/gpu_wheels.sh [DIR].
# There: make gpu WHEELS=DIR. PYTHON_VERSION names that machine's Python. Liger's kernels are no part
# of phi4: the baselines that ours are timed against, op by op and in complete steps.
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:-build/gpu-wheels}
pip=${PIP:-.venv/bin/pip}
mkdir -p "$directory"
"$pip" download -q --no-deps -d "$directory" --only-binary :all: \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    "megatron-core==0.16.1" "$("$pip" freeze | grep "^pydantic==")" "$("$pip" freeze | grep '^pydantic_core==')" \
    annotated-types typing-inspection tomli-w msgspec psutil liger-kernel
du -sh "$directory"
