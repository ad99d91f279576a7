#!/usr/bin/env bash
# On a machine with one GPU and no network: kernels proven and timed, the engine against the CPU,
# training timed against others.
# Leaves rows to commit. A part takes at most PART_SECONDS (240) and writes each row as it has it, so
# a part that fails or runs out of time costs neither its earlier rows nor the later parts.
#
#   tools/gpu_check.sh                      # all parts, the most valuable first
#   tools/gpu_check.sh numbers engine       # some parts
#   tools/gpu_check.sh --list               # the parts; needs no GPU
#
# PYTHON names the interpreter; it needs torch >= 2.11, triton >= 3.6, numpy, pytest and hypothesis,
# and part steps transformers for two of its sides and Transformer Engine for one: a side whose
# package is not installed is reported as absent. What the engine and Liger's sides need besides
# (tools/gpu_wheels.sh collects it) is taken from the directory WHEELS. PHI4_COMMIT names the commit
# in the rows where this is a copy whose .git is missing or of another state.
# csrc is built here where nvcc is, and taken from build/csrc/ where it was built elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
part_seconds=${PART_SECONDS:-240}
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
# nproc would obey OMP_NUM_THREADS, which says nothing of how many processes fit.
jobs=$(getconf _NPROCESSORS_ONLN)

declare -A parts=(
    [numbers]="the error rule on every case of every op; the rows that let auto choose a kernel"
    [qualify]="what phi4 train does on a new card: two sizes of every op, timed against torch, in 60 s"
    [steps]="training at phi-4's width against megatron-core, plain torch, transformers and Liger"
    [engine]="ten steps on the GPU against the CPU, saved and resumed on either"
    [attention]="attention timed against cuDNN and FlashAttention where they are installed"
    [loss_head]="cross-entropy and the chunked loss head timed"
    [memory]="every other op timed: norms, SwiGLU, RoPE, AdamW, gradient norm, casts"
    [hopper]="attention in Gluon: proven, then timed against Triton"
    [libraries]="attention of FlashAttention and cuDNN, where they are installed: proven"
    [csrc]="tests marked gpu of the CUDA ops"
    [triton]="tests marked gpu of the Triton ops"
)
order=(numbers qualify steps engine attention loss_head memory hopper libraries csrc triton)

within() {  # run a command in what is left of the part's time; a failure does not end the part
    local left=$((part_ends - SECONDS)) code=0
    if [ "$left" -le 0 ]; then
        echo "make gpu: part $part has used its $part_seconds s; not run: $*"
        code=124
    else
        timeout --kill-after=10 "$left" "$@" || code=$?
        [ "$code" -eq 0 ] || echo "make gpu: part $part: exit status $code of: $*"
    fi
    [ "$code" -eq 0 ] || status=$code
}
gpu_tests() {  # --noconftest: the other packages' test plugins need what is not installed here
    within "$python" -m pytest "$1" -m gpu -q --noconftest -p no:cacheprovider --durations=5
}
timed() {  # the bench checks an op again before it times it, so a red op has no times
    local op
    for op in "$@"; do
        within "$python" -m phi4_kernels.bench --op "$op" --json benchmarks/kernels.jsonl
    done
}

part_numbers() { within "$python" -m phi4_kernels.testing numbers --jobs "$jobs" --record; }
part_qualify() { within "$python" -m phi4_kernels.qualification --again; }
part_steps() {  # it ends by itself and says what there was no time for
    within "$python" tools/gpu_step_time.py --out benchmarks/gpu_step_time.jsonl \
        --seconds "$part_seconds"
}
part_engine() {
    within "$python" tools/gpu_engine.py --out benchmarks/gpu_engine.jsonl
    gpu_tests tests/engine/test_gpu_weight_gradients.py
    gpu_tests tests/engine/fp8/test_gpu_te.py
}
part_attention() {
    within "$python" -m phi4_kernels.bench --op attention --json benchmarks/kernels.jsonl \
        --against torch,cudnn,flash-attn,flash-attn-deterministic,flash-attn-3,flash-attn-3-deterministic
}
part_loss_head() { timed cross_entropy; }
part_memory() {
    timed $("$python" -c 'from phi4_kernels.registry import OPS
print(*(op for op in OPS if op not in ("attention", "cross_entropy")))')
}
part_hopper() {
    within "$python" -m phi4_kernels.testing numbers --op attention --implementation gluon \
        --jobs "$jobs" --record
    within "$python" -m phi4_kernels.bench.speed_gate --op attention
    gpu_tests tests/kernels/test_gpu_gluon.py
}
part_libraries() {
    within "$python" -m phi4_kernels.testing numbers --op attention --implementation flash \
        --jobs "$jobs" --record
    within "$python" -m phi4_kernels.testing numbers --op attention --implementation cudnn \
        --jobs "$jobs" --record
    gpu_tests tests/kernels/test_gpu_foreign_attention.py
}
part_csrc() { gpu_tests tests/csrc/test_gpu_ops.py; }
part_triton() {
    gpu_tests tests/kernels/test_gpu.py
    gpu_tests tests/kernels/test_gpu_attention.py
    gpu_tests tests/kernels/test_gpu_cross_entropy.py
}

[ "$#" -gt 0 ] || set -- "${order[@]}"
for part in "$@"; do
    if [ "$part" = --list ]; then
        for name in "${order[@]}"; do printf '%-10s %s\n' "$name" "${parts[$name]}"; done
        exit 0
    elif [ -z "${parts[$part]:-}" ]; then
        echo "make gpu: there is no part $part; use some of: ${order[*]}" >&2
        exit 2
    fi
done
"$python" - <<'PY'
import sys
import torch

if not torch.cuda.is_available():
    sys.exit("make gpu: torch finds no CUDA device; run this on a machine with an NVIDIA GPU")
import triton

name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
print(f"{name}, capability {capability}, torch {torch.__version__}, triton {triton.__version__}")
PY
if [ -n "${WHEELS:-}" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install -q --no-index --no-deps --target "$packages" "$WHEELS"/*.whl
    PYTHONPATH+=":$packages"
fi

status=0
part=build part_ends=$((SECONDS + part_seconds))
within "$python" tools/build_csrc.py
for part in "$@"; do
    started=$SECONDS part_ends=$((SECONDS + part_seconds))
    echo "make gpu: $part: ${parts[$part]}"
    "part_$part"
    echo "make gpu: $part took $((SECONDS - started)) s"
done
"$python" -m tools.benchmark_page || status=$?
echo "to commit: kernels/phi4_kernels/correctness.jsonl, speed.jsonl, benchmarks/, BENCHMARKS.md"
exit "$status"
