"""Measure how long a save blocks training, synchronous and asynchronous.

Two data ranks write their shares of one state. Three kinds of save take turns, so what else runs on
the machine meets them alike: waited for; asynchronous; asynchronous with every wait for the disk
one second longer. Training continues during an asynchronous save, whose stall is the time
that the training thread spends in it: starting it, and polling after every step.

    python -m tools.async_save --pairs 7 --json benchmarks/async_save.jsonl
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch.distributed as dist

from phi4.config import Recipe, with_overrides
from phi4.engine.agreement import Asked, nothing_asked
from phi4.engine.checkpoint import PendingSave, SaveRequest, load_checkpoint, verify_checkpoint
from phi4.engine.checkpoint.saving import save_checkpoint
from phi4.engine.engine import Engine
from phi4.rundir.checkpoints import Retention
from phi4.rundir.manifest import read_manifest
from phi4.stages.pretrain import NextToken
from phi4.verify.measured_rows import append_row, provenance
from phi4.writer import Staging, WriterProcess
from phi4.writer.client import start_interpreter
from tests.support.engines import batches_of, engine_on
from tests.support.ranks import run_ranks

LIMIT = 0.1
"""Of an asynchronous save's stall, as a share of one that is waited for."""
BYTES_TOLERANCE = 0.001
"""Of the sizes of checkpoints: indexes name ranks and files."""

_SLOW = """
import os, time
sync = os.fsync
os.fsync = lambda fd: (time.sleep(1), sync(fd))
"""
_RECIPE = """
model.num_layers=8 model.hidden_size=1024 model.num_attention_heads=8 model.num_key_value_heads=2
model.intermediate_size=2816 model.vocab_size=512 model.max_position_embeddings=64
data.sequence_length=32 data.unit_tokens=32 batch.global_batch_size=2 precision.dtype=fp32
parallel.data=2
"""
KINDS = ("waited", "asynchronous", "slow")


def measured(rank: int, world_size: int, root: Path, pairs: int) -> dict[str, Any]:
    """Inside a rank: stalls in seconds by kind and round, and bytes written."""
    recipe = with_overrides(Recipe(), _RECIPE.split())
    with engine_on(rank, recipe) as engine, ExitStack() as stack:
        train(engine, 0)
        writers = {}
        for kind, first in (("asynchronous", ""), ("slow", _SLOW)):
            start = partial(start_interpreter, first=first)
            staging = Staging(engine.platform.device, world_size)
            writers[kind] = stack.enter_context(closing(WriterProcess(staging, start)))
        stalls: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(pairs + 1):
            for shift in range(len(KINDS)):
                kind = KINDS[(turn + shift) % len(KINDS)]
                place = root / kind
                stalls[kind].append(stall(engine, place, turn, writers.get(kind)))
        sizes = {kind: written_bytes(root / kind, pairs) for kind in KINDS}
        with patch("phi4.engine.checkpoint.saving.FullyParallelSaveStrategyWrapper", rank_0_alone):
            stall(engine, root / "alone", pairs, None)
        sizes["by data rank 0 alone"] = written_bytes(root / "alone", pairs)
        newest = root / "slow" / f"step_{pairs:07d}"
        load_checkpoint(engine, newest, verify_checkpoint(engine, newest))
        share = sum(
            entry.bytes
            for name, entry in read_manifest(newest).files.items()
            if name.startswith(f"__{rank}_")
        )
    # The first of each kind allocates what the others use again.
    return {"stalls": {kind: s[1:] for kind, s in stalls.items()}, "sizes": sizes, "share": share}


def rank_0_alone(strategy: object, group: object) -> object:
    """Instead of megatron-core's wrapper that gives every data rank a share."""
    return strategy


def train(engine: Engine, step: int, asked: Callable[[], Asked] = nothing_asked) -> Asked:
    """One step; what the ranks told each other in it."""
    batches = batches_of(engine, step)
    return engine.train_step(batches, NextToken(), learning_rate=1e-4, asked=asked).asked


def stall(engine: Engine, root: Path, step: int, writer: WriterProcess | None) -> float:
    """Seconds that the training thread spends in a save."""
    # Ranks meet first: how far they are apart is not of the save.
    dist.barrier()
    begun = time.perf_counter()
    if writer is None:
        save_checkpoint(engine, root, step, form="full", keep=1, files={}, data={})
        return time.perf_counter() - begun
    request = SaveRequest(root, step, "full", Retention(1), {}, {})
    pending = PendingSave(engine, request, writer, lease=None, seconds=600)
    seconds, durable = time.perf_counter() - begun, None

    def told() -> Asked:
        nonlocal seconds
        begun = time.perf_counter()
        asked = Asked(False, False, False, *pending.told())
        seconds += time.perf_counter() - begun
        return asked

    while durable is None:
        agreed = train(engine, step, told)
        dist.barrier()
        begun = time.perf_counter()
        durable = pending.go_on(agreed)
        seconds += time.perf_counter() - begun
    return seconds


def written_bytes(root: Path, step: int) -> int:
    """Size of a checkpoint."""
    return sum(file.stat().st_size for file in (root / f"step_{step:07d}").iterdir())


def compare(pairs: int, place: Path | None) -> dict[str, Any]:
    """Return the row."""
    root = Path(tempfile.mkdtemp(prefix="async_save_", dir=place))
    try:
        ranks = run_ranks(2, measured, root, pairs)
    finally:
        shutil.rmtree(root)
    # Training is blocked as long as its slowest rank.
    stalls = {k: np.max([rank["stalls"][k] for rank in ranks], axis=0) for k in KINDS}
    medians = {kind: float(np.median(seconds)) for kind, seconds in stalls.items()}
    ratio = float(np.median(stalls["asynchronous"] / stalls["waited"]))
    slow_ratio = float(np.median(stalls["slow"] / stalls["waited"]))
    sizes = ranks[0]["sizes"]
    return {
        "benchmark": "async_save",
        "ratio": round(ratio, 4),
        "slow_ratio": round(slow_ratio, 4),
        "limit": LIMIT,
        "stall_seconds": {kind: round(seconds, 4) for kind, seconds in medians.items()},
        "pairs": pairs,
        "bytes_per_rank": [rank["share"] for rank in ranks],
        "bytes": sizes,
        "passed": max(ratio, slow_ratio) <= LIMIT
        and max(sizes.values()) - min(sizes.values()) <= BYTES_TOLERANCE * min(sizes.values())
        and min(rank["share"] for rank in ranks) >= 100e6,
    }


def main() -> None:
    """Command line; exit code 1 when a limit is not held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append the row to this file")
    parser.add_argument("--place", type=Path, help="a directory on the disk to measure")
    options = parser.parse_args()
    row = compare(options.pairs, options.place)
    print(json.dumps(row | provenance()))
    if options.json:
        append_row(options.json, row)
    raise SystemExit(not row["passed"])


if __name__ == "__main__":
    main()
