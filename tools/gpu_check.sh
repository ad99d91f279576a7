#!/usr/bin/env bash
# On a machine with one GPU and no network: the engine against the CPU, the kernel tests marked gpu,
# correctness rows, benches, BENCHMARKS.md. Leaves rows to commit. Fits in 10 minutes. PYTHON names
# the interpreter; it needs torch >= 2.11, triton >= 3.6, numpy, pytest and hypothesis. What the
# engine needs besides (tools/gpu_wheels.sh collects it) is taken from the directory WHEELS.
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
timeout 90 "$python" tools/gpu_engine.py --out benchmarks/gpu_engine.json || status=$?
# --noconftest: the other rooms' test plugins need packages that this machine may lack.
timeout 170 "$python" -m pytest tests/kernels/test_gpu.py -m gpu -q --noconftest \
    -p no:cacheprovider --durations=5 || status=$?
timeout 80 "$python" -m phi4_kernels.testing numbers --record || status=$?
# The bench checks each op again before it times it, so a red op costs its numbers alone.
for op in rms_norm swiglu rope cross_entropy; do
    timeout 55 "$python" -m phi4_kernels.bench --op "$op" --json benchmarks/kernels.jsonl || status=$?
done
"$python" -m phi4_kernels.bench --report || status=$?
echo "to commit: kernels/phi4_kernels/correctness.jsonl benchmarks/ BENCHMARKS.md"
exit "$status"
