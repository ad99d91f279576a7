"""Training speed on one GPU at phi-4's width, against megatron-core, transformers and Liger.

Part of `make gpu`. Layers of phi-4 with its whole vocabulary, rows of 4,096 tokens, bf16. Each side
runs in a process of its own and has the GPU to itself while it is built, warmed up and timed; the
next one imports meanwhile. Sides are timed at two depths, which gives the time of a layer and of
the rest, and what 40 layers would do on one GPU without communication (`tools/step_slice.py`).

    python tools/gpu_step_time.py --out benchmarks/gpu_step_time.jsonl
    python tools/gpu_step_time.py --side "plain torch" --trace /tmp/trace
    python tools/gpu_step_time.py --tiny            # the script itself, on a CPU
"""

import argparse
import gc
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from tools.step_sides import (
    LIGER,
    OURS,
    SIDES,
    STOCK,
    STOCK_TE,
    Kind,
    TrainingStep,
    import_all,
    recipe_of,
    why_absent,
)
from tools.step_slice import PEAK_TFLOPS, Depth, compare, describe, mfu, slice_columns, with_layers
from tools.step_trace import write_trace

WARMUP, STEPS = 3, 6
"""Of a side at each depth."""
BF16_TOLERANCE = 5e-3
"""Of the first losses, between sides: later ones differ by how weights are kept."""
FP32_TOLERANCE = 2e-6
"""Of every loss, between the sides of the small form: another order of summation."""
SIDE_SECONDS = 75
"""Of one side on a GPU, from its turn on; one that takes longer is ended and reported."""
RESERVE_SECONDS = 10
"""Of the whole run, kept for its last lines."""


def run_side(name: str, kind: Kind, layers: Sequence[int], trace: Path | None) -> dict:
    """Speed, MFU, memory and losses of a side at the first depth, and its slice.

    Args:
        name: key of SIDES.
        kind: cpu for the small form.
        layers: the depths; a side that is not sliced takes the first one.
        trace: where a trace of one step goes, at the last depth and after all times; None writes
            none.
    """
    side = SIDES[name]
    layers = layers if side.sliced else layers[:1]
    measured = []
    for num_layers in layers:
        traced = trace if num_layers == layers[-1] else None
        measured.append(_at_depth(name, kind, num_layers, traced))
        gc.collect()
    depths = [depth for depth, _, _ in measured]
    _, losses, settings = measured[0]
    return _row(name, recipe_of(side, kind, layers[0]), depths, losses) | {"settings": settings}


def _at_depth(
    name: str, kind: Kind, num_layers: int, trace: Path | None
) -> tuple[Depth, list[float], dict]:
    """Build a side, time it and let it go; its losses and settings."""
    side = SIDES[name]
    recipe = recipe_of(side, kind, num_layers)
    before = _allocated(kind)
    step = side.build(recipe, kind, side)
    seconds, losses = _timed(step, recipe, side.documents, kind)
    depth = Depth(num_layers, _ms(seconds), _peak_gib(kind, before))
    if trace:
        write_trace(trace, name, kind, partial(step, _batches(recipe, side.documents, 0)))
    settings = step.settings()
    step.close()
    return depth, losses, settings


def _timed(
    step: TrainingStep, recipe, documents: int, kind: Kind
) -> tuple[list[float], list[float]]:
    """Seconds of STEPS steps after WARMUP others, and the losses of all.

    On a CPU they are seconds of this process, because other work may share the machine.
    """
    clock = time.process_time if kind == "cpu" else time.perf_counter
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for index in range(WARMUP + STEPS):
        batches = _batches(recipe, documents, index)
        start = clock()
        losses.append(step(batches))  # a float: the step has ended
        seconds.append(clock() - start)
    return seconds[WARMUP:], losses


def _batches(recipe, documents: int, index: int) -> list:
    from tools.step_time import host_batches

    return host_batches(recipe, documents, index)


def _row(name: str, recipe, depths: Sequence[Depth], losses: list[float]) -> dict:
    from phi4.config import Recipe

    first, row_tokens = depths[0], recipe.data.sequence_length
    step_tokens = recipe.batch.global_batch_size * row_tokens
    rate = step_tokens * 1e3 / sorted(first.step_ms)[len(first.step_ms) // 2]
    causal, full = mfu(rate, recipe.model, row_tokens)
    row = {
        "side": name,
        "tokens_per_second": round(rate),
        "mfu": causal,
        "mfu_full": full,
        "peak_tflops": PEAK_TFLOPS,
        "step_ms": first.step_ms,
        "peak_gib": first.peak_gib,
        "losses": losses,
        "num_layers": first.num_layers,
        "row_tokens": row_tokens,
        "documents_per_row": SIDES[name].documents,
    }
    if len(depths) == 2:
        whole = with_layers(recipe.model, Recipe().model.num_layers)
        row |= slice_columns(*depths, whole, row_tokens, step_tokens)
    return row


def _ms(seconds: Sequence[float]) -> list[float]:
    return sorted(round(s * 1e3, 2) for s in seconds)


def _allocated(kind: Kind) -> int:
    if kind == "cpu":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _peak_gib(kind: Kind, before: int) -> float | None:
    if kind == "cpu":
        return None
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def run_all(arguments: argparse.Namespace) -> int:
    """Return every side in a process of its own, each row recorded as it is there.

    Returns:
        0 when every side ran or cannot run here, and all agree in their first losses.
    """
    run, ends = uuid.uuid4().hex[:12], time.monotonic() + arguments.seconds - RESERVE_SECONDS
    kind: Kind = "cpu" if arguments.tiny else "cuda"
    rows, failed = [], []
    names = arguments.side or list(SIDES)
    for name, outcome in zip(names, _outcomes(names, kind, ends, arguments), strict=True):
        if isinstance(outcome, str):
            if why_absent(SIDES[name], kind) is None:
                failed.append(f"{name}: {outcome}")
            outcome = {"side": name, "absent": outcome}
        _record({"run": run, **outcome}, arguments)
        rows.append(outcome)
    print(*compare(rows, OURS, [STOCK_TE, STOCK, LIGER]), sep="\n")
    failed += disagreements(rows, kind)
    print(*(f"FAILED {text}" for text in failed), sep="\n")
    return int(bool(failed))


def _outcomes(
    names: Sequence[str], kind: Kind, ends: float, arguments: argparse.Namespace
) -> Iterator[dict | str]:
    """In order, a side's row or why there is none; the next side imports while one runs."""
    # On a CPU, imports would take what the small form is timed on.
    together = 1 if kind == "cpu" else 2
    reasons = [why_absent(SIDES[name], kind) for name in names]
    waiting: dict[int, subprocess.Popen] = {}
    runnable = [i for i, reason in enumerate(reasons) if reason is None]
    for index, reason in enumerate(reasons):
        for ahead in [i for i in runnable if i >= index][:together] if reason is None else []:
            if ahead not in waiting and time.monotonic() < ends:
                waiting[ahead] = _start(names[ahead], arguments)
        yield reason or _outcome(waiting.get(index), ends, arguments.tiny)


def _outcome(process: subprocess.Popen | None, ends: float, tiny: bool) -> dict | str:
    """Let a waiting process go and wait for its row."""
    left = ends - time.monotonic()
    if process is None or left <= 0:
        _end(process)
        return "not run: no time was left"
    limit = None if tiny else min(SIDE_SECONDS, left)
    try:
        output, _ = process.communicate("go\n", timeout=limit)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"failed: took more than {limit:.0f} s"
    if process.returncode:
        return f"failed: exit status {process.returncode}"
    return json.loads(output.splitlines()[-1])


def _end(process: subprocess.Popen | None) -> None:
    if process is not None:
        process.kill()
        process.communicate()


def _start(name: str, arguments: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.gpu_step_time", "--child", "--side", name]
    command += ["--layers", *map(str, arguments.layers), *(["--tiny"] if arguments.tiny else [])]
    command += ["--trace", str(arguments.trace)] if arguments.trace else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


def _record(row: dict, arguments: argparse.Namespace) -> None:
    from phi4.verify.measured_rows import append_row
    from tools.gpu_engine import commit_of_copy

    device = "cpu" if arguments.tiny else torch.cuda.get_device_name()
    append_row(arguments.out, {"device": device, **commit_of_copy(), **row})
    print(describe(row), flush=True)


def disagreements(rows: Sequence[dict], kind: Kind) -> list[str]:
    """Sides whose losses are not those of the first one; all start from the same weights."""
    same = [row for row in rows if "absent" not in row and row["documents_per_row"] == 1]
    count, tolerance = (None, FP32_TOLERANCE) if kind == "cpu" else (1, BF16_TOLERANCE)
    found = []
    for row in same[1:]:
        pairs = list(zip(row["losses"], same[0]["losses"], strict=True))[:count]
        error = max(abs(loss / expected - 1) for loss, expected in pairs)
        if not error <= tolerance:
            first = f"{same[0]['side']}'s by {error:.1e}, more than {tolerance:.0e}"
            found.append(f"{row['side']}: its losses differ from {first}")
    return found


def main() -> int:
    """Run all sides, or one in a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", action="append", choices=SIDES, help="instead of all; repeatable")
    parser.add_argument("--layers", type=int, nargs=2, default=(2, 4), help="the two depths")
    parser.add_argument("--out", type=Path, default=Path("gpu_step_time.jsonl"))
    parser.add_argument("--trace", type=Path, help="write a Chrome trace and a table per side here")
    parser.add_argument("--seconds", type=float, default=240.0, help="all sides together, on a GPU")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layers[0] >= arguments.layers[1] or arguments.layers[0] < 1:
        parser.error(f"--layers {arguments.layers}: give two depths, the smaller one first")
    if arguments.tiny:
        arguments.seconds = float("inf")
    elif not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; use --tiny for the script itself on a CPU")
    if not arguments.child:
        return run_all(arguments)
    [name] = arguments.side
    import_all(SIDES[name])
    if not sys.stdin.readline():  # a line says that it is this side's turn
        return 1  # who would have said so is gone
    kind: Kind = "cpu" if arguments.tiny else "cuda"
    print(json.dumps(run_side(name, kind, arguments.layers, arguments.trace)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
