#!/usr/bin/env bash
# On a machine with one GPU and no network: the engine against the CPU, the tests marked gpu,
# correctness rows, benches, BENCHMARKS.md. Leaves rows to commit. PYTHON names the interpreter; it
# needs torch >= 2.11, triton >= 3.6, numpy, pytest and hypothesis. What the engine needs besides
# (tools/gpu_wheels.sh collects it) is taken from the directory WHEELS. csrc is built here where
# nvcc is, and taken from build/csrc/ where it was built elsewhere.
#
#   tools/gpu_check.sh                  # everything, in this order
#   tools/gpu_check.sh csrc bench       # some parts; each fits in 10 minutes
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

"$python" - <<'PY'
import sys
import torch
import triton

if not torch.cuda.is_available():
    sys.exit("make gpu: torch sees no CUDA device; expected one GPU; run it on such a machine")
name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
print(f"{name}, capability {capability}, torch {torch.__version__}, triton {triton.__version__}")
PY

status=0
if [ -n "${WHEELS:-}" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install -q --no-index --no-deps --target "$packages" "$WHEELS"/*.whl
    PYTHONPATH+=":$packages"
fi
gpu_tests() {  # --noconftest: the other rooms' test plugins need packages that are not here
    timeout "$1" "$python" -m pytest "$2" -m gpu -q --noconftest -p no:cacheprovider --durations=5
}
timed() {  # the bench checks each op again before it times it: a red op costs its numbers alone
    for op in "$@"; do
        timeout "${SECONDS_PER_OP:-70}" "$python" -m phi4_kernels.bench --op "$op" \
            --json benchmarks/kernels.jsonl || status=$?
    done
}
engine() { timeout 150 "$python" tools/gpu_engine.py --out benchmarks/gpu_engine.json || status=$?; }
triton() {
    gpu_tests 300 tests/kernels/test_gpu.py || status=$?
    gpu_tests 240 tests/kernels/test_gpu_attention.py || status=$?
    gpu_tests 150 tests/kernels/test_gpu_cross_entropy.py || status=$?
}
csrc() { gpu_tests 240 tests/csrc/test_gpu_ops.py || status=$?; }
numbers() { timeout 240 "$python" -m phi4_kernels.testing numbers --record || status=$?; }
bench() {
    timed rms_norm swiglu rope
    timed adamw grad_norm fp8_cast
    "$python" -m phi4_kernels.bench --report || status=$?
}

loss_head() {  # products of 50 TFLOP, a quarter of a minute per row
    SECONDS_PER_OP=400 timed cross_entropy
    "$python" -m phi4_kernels.bench --report || status=$?
}

attention() {  # the bench interleaves ours with cuDNN and FlashAttention where they are installed
    timeout 400 "$python" -m phi4_kernels.bench --op attention --json benchmarks/kernels.jsonl \
        --against torch,cudnn,flash-attn,flash-attn-deterministic,flash-attn-3,flash-attn-3-deterministic \
        || status=$?
    "$python" -m phi4_kernels.bench --report || status=$?
}

hopper() {  # attention in Gluon: proven, recorded, and timed against Triton for `auto`
    gpu_tests 150 tests/kernels/test_gpu_gluon.py || status=$?
    timeout 90 "$python" -m phi4_kernels.testing numbers --op attention --implementation gluon \
        --record || status=$?
    timeout 150 "$python" -m phi4_kernels.bench.challenge --op attention || status=$?
}

timeout 120 "$python" tools/build_csrc.py || status=$?
if [ "$#" -eq 0 ]; then set -- engine triton csrc numbers attention hopper bench loss_head; fi
for part in "$@"; do
    case "$part" in
        engine | triton | csrc | numbers | attention | hopper | bench | loss_head) "$part" ;;
        *)
            echo "make gpu: no part $part; expected engine, triton, csrc, numbers, attention, hopper, bench or loss_head"
            exit 2
            ;;
    esac
done
echo "to commit: kernels/phi4_kernels/correctness.jsonl, speed.jsonl, benchmarks/, BENCHMARKS.md"
exit "$status"
