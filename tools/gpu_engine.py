"""The engine on one GPU against the engine on the CPU: same weights, same batches, one file.

Part of `make gpu`. Runs the tiny recipe in fp32 and bf16 over NCCL, compares the losses with the
CPU, saves on the GPU and resumes on the CPU. Beside torch it needs megatron-core, pydantic, tomli-w
and msgspec.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
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


def compare(gpu: str) -> list[dict]:
    """One row per comparison; `gpu` is cuda, or cpu to try the script without a GPU."""
    from phi4_kernels import native

    half, built = STEPS // 2, native.missing() is None
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        expected = in_process("cpu", "fp32", 0, STEPS, root / "cpu")
        fp32 = in_process(gpu, "fp32", 0, half, root / "gpu")
        resumed = in_process("cpu", "fp32", half, STEPS, root / "gpu")
        continued = in_process(gpu, "fp32", half, STEPS, root / "gpu")
        bf16 = in_process(gpu, "bf16", 0, STEPS, root / "bf16")
        wide = in_process("cpu", "fp32" + WIDE, 0, STEPS, root / "wide")
        named = {
            dtype: in_process(gpu, dtype + KERNELS, 0, STEPS, root / f"{dtype}_kernels")
            for dtype in (("fp32", "bf16") if gpu == "cuda" else ())
        }
        stepped = {
            dtype: in_process(gpu, dtype + OPTIMIZER, 0, STEPS, root / f"{dtype}_optimizer")
            for dtype in (("fp32", "bf16") if built else ())
        }
    tolerances = {"fp32": FP32_TOLERANCE, "bf16": BF16_TOLERANCE}
    return [
        _row(
            "fp32 on the GPU, saved and resumed there", fp32 + continued, expected, FP32_TOLERANCE
        ),
        _row("saved on the GPU, resumed on the CPU", resumed, expected[half:], FP32_TOLERANCE),
        _row("bf16 on the GPU", bf16, expected, BF16_TOLERANCE),
        *(
            _row(f"{dtype} with the Triton kernels", losses, wide, tolerances[dtype])
            for dtype, losses in named.items()
        ),
        *(
            _row(f"{dtype} with the CUDA optimizer", losses, expected, tolerances[dtype])
            for dtype, losses in stepped.items()
        ),
    ]


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


def main() -> int:
    """Run all comparisons, or one case in a child; 0 when all passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=5, metavar=("KIND", "DTYPE", "FIRST", "LAST", "ROOT"))
    parser.add_argument("--out", type=Path, default=Path("gpu_engine.json"))
    parser.add_argument("--gpu", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.case:
        kind, dtype, first, last, root = arguments.case
        print(json.dumps(run_case(kind, dtype, int(first), int(last), Path(root))))
        return 0
    if arguments.gpu == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; run this on a machine with a GPU", file=sys.stderr)
        return 2
    rows = compare(arguments.gpu)
    device = torch.cuda.get_device_name() if arguments.gpu == "cuda" else platform.processor()
    report = {"device": device, "torch": torch.__version__, "rows": rows}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        verdict = "ok" if row["passed"] else "FAILED"
        print(f"{row['case']}: error {row['largest_relative_error']:.1e} {verdict}")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
