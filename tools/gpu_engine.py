"""The engine on one GPU against the engine on the CPU: same weights, same batches, a row per case.

Part of `make gpu`. Runs the tiny recipe in fp32 and bf16 over NCCL, compares the losses with the
CPU, saves on the GPU and resumes on the CPU. In addition to torch it needs megatron-core, pydantic,
tomli-w and msgspec.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

RECIPE = Path("examples/recipes/tiny_pretrain.toml")
STEPS = 10
FP32_TOLERANCE = 2e-5
"""Of the loss: another order of summation, no TF32."""
BF16_TOLERANCE = 2e-2
WIDE = "+wide"
"""Suffix of a dtype: heads of 64, which the attention kernels take."""
KERNELS = "+kernels"
"""The same, with the Triton form of every op that has one."""
OPTIMIZER = "+optimizer"
"""Suffix of a dtype: with csrc's gradient norm and AdamW."""
_HEADS_OF_64 = (
    "model.hidden_size=256",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
)
_TRITON_OPS = ("rope", "rms_norm", "swiglu", "attention", "cross_entropy")


def run_case(kind: str, dtype: str, first: int, last: int, root: Path) -> list[float]:
    """Losses of steps first..last in this process; loads when first > 0, saves at last."""
    from phi4.config import load_recipe, with_overrides
    from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
    from phi4.engine.engine import Engine
    from phi4.engine.platform import connect, disconnect
    from phi4.stages.pretrain import NextToken
    from phi4.verify.layouts import reference_case
    from phi4.verify.parity import LEARNING_RATE, micro_batches

    number, plus, name = dtype.partition("+")
    suffix = plus + name
    overrides = [f"precision.dtype={number}", "parallel.distributed_optimizer=true"]
    if suffix == OPTIMIZER:
        overrides += [f"kernels.{op}=cuda" for op in ("adamw", "grad_norm")]
    if suffix in (WIDE, KERNELS):
        overrides += _HEADS_OF_64
    if suffix == KERNELS:
        overrides += [f"kernels.{op}=triton" for op in _TRITON_OPS]
    recipe = with_overrides(reference_case(load_recipe(RECIPE)).recipe, overrides)
    engine = Engine(recipe, connect(kind))
    if first:
        checkpoint = root / f"step_{first:07d}"
        load_checkpoint(engine, checkpoint, verify_checkpoint(engine, checkpoint))
    losses = [
        engine.train_step(
            micro_batches(recipe, step, 0, 1), NextToken(), learning_rate=LEARNING_RATE
        ).loss
        for step in range(first, last)
    ]
    save_checkpoint(engine, root, last, form="full", keep=9, files={}, data={})
    engine.close()
    disconnect()
    return losses


def in_process(kind: str, dtype: str, first: int, last: int, root: Path) -> list[float]:
    """`run_case` in a process of its own: a process has one platform."""
    command = [sys.executable, __file__, "--case", kind, dtype, str(first), str(last), str(root)]
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{kind} {dtype} steps {first} to {last} failed")
    return json.loads(result.stdout.splitlines()[-1])


def compare(gpu: str) -> Iterator[dict]:
    """One row per comparison, each as soon as it is there, the most telling first.

    Args:
        gpu: cuda, or cpu to try the script without a GPU.
    """
    from phi4_kernels import cuda_library

    half, tolerances = STEPS // 2, {"fp32": FP32_TOLERANCE, "bf16": BF16_TOLERANCE}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        expected = in_process("cpu", "fp32", 0, STEPS, root / "cpu")
        bf16 = in_process(gpu, "bf16", 0, STEPS, root / "bf16")
        yield _row("bf16 on the GPU", bf16, expected, BF16_TOLERANCE)
        if gpu == "cuda":
            wide = in_process("cpu", "fp32" + WIDE, 0, STEPS, root / "wide")
            for dtype, tolerance in tolerances.items():
                losses = in_process(gpu, dtype + KERNELS, 0, STEPS, root / f"{dtype}_kernels")
                yield _row(f"{dtype} with the Triton kernels", losses, wide, tolerance)
        fp32 = in_process(gpu, "fp32", 0, half, root / "gpu")
        resumed = in_process("cpu", "fp32", half, STEPS, root / "gpu")
        yield _row("saved on the GPU, resumed on the CPU", resumed, expected[half:], FP32_TOLERANCE)
        fp32 += in_process(gpu, "fp32", half, STEPS, root / "gpu")
        yield _row("fp32 on the GPU, saved and resumed there", fp32, expected, FP32_TOLERANCE)
        if cuda_library.missing() is None:
            for dtype, tolerance in tolerances.items():
                losses = in_process(gpu, dtype + OPTIMIZER, 0, STEPS, root / f"{dtype}_optimizer")
                yield _row(f"{dtype} with the CUDA optimizer", losses, expected, tolerance)


def _row(case: str, losses: list[float], expected: list[float], tolerance: float) -> dict:
    error = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    return {
        "case": case,
        "losses": losses,
        "cpu_losses": expected,
        "largest_relative_error": error,
        "tolerance": tolerance,
        "passed": error <= tolerance,
    }


def commit_of_copy() -> dict[str, str]:
    """PHI4_COMMIT as a column of a row: the commit of a copy whose .git is missing or older."""
    commit = os.environ.get("PHI4_COMMIT")
    return {"commit": commit} if commit else {}


def main() -> int:
    """Run all comparisons, or one case in a child; 0 when all passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=5, metavar=("KIND", "DTYPE", "FIRST", "LAST", "ROOT"))
    parser.add_argument("--out", type=Path, default=Path("gpu_engine.jsonl"))
    parser.add_argument("--gpu", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.case:
        kind, dtype, first, last, root = arguments.case
        print(json.dumps(run_case(kind, dtype, int(first), int(last), Path(root))))
        return 0
    if arguments.gpu == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; run this on a machine with a GPU", file=sys.stderr)
        return 2
    from phi4.verify.measured_rows import append_row

    device = torch.cuda.get_device_name() if arguments.gpu == "cuda" else platform.processor()
    passed = True
    for row in compare(arguments.gpu):
        append_row(arguments.out, {"device": device, **commit_of_copy(), **row})
        verdict = "ok" if row["passed"] else "FAILED"
        print(f"{row['case']}: error {row['largest_relative_error']:.1e} {verdict}", flush=True)
        passed = passed and row["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
