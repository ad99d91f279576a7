"""Step time of this checkout, or of a commit, against an earlier one, in one run.

Each side is processes of its own that import its own tree and do the steps of tools/step_time.py,
each on one CPU thread. The sides take turns, and every other pair swaps the order, so what else
runs on the machine meets both alike. Where a process has its memory alone moves its steps by some
percent, so both are restarted a few times. What a commit alone costs is `COMMIT^ --after COMMIT`.

    python -m tools.step_time_before COMMIT --pairs 200 --json benchmarks/step_time_before.jsonl
    python -m tools.step_time_before COMMIT^ --after COMMIT --dtype fp32 bf16 --tensor 1 2
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path

import numpy as np

from phi4.verify.measured_rows import append_row, provenance

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 8
STARTS = 4
_WORKER = """
import sys, time
from phi4.config import with_overrides
from phi4.engine.engine import Engine
from phi4.engine.platform import connect
from phi4.stages.pretrain import NextToken
from tools.step_time import benchmark_recipe, host_batches

place, rank, size, *overrides = sys.argv[1:]
recipe = with_overrides(benchmark_recipe(2), overrides)
platform = connect("cpu", rank=int(rank), world_size=int(size), rendezvous=place)
engine, rate = Engine(recipe, platform), recipe.optim.learning_rate
batches = [host_batches(recipe, 1, index) for index in range(16)]
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter(), time.process_time()
    step = batches[int(line) % len(batches)]
    loss = engine.train_step(step, NextToken(), learning_rate=rate).loss
    print(time.perf_counter() - start[0], time.process_time() - start[1], loss, flush=True)
"""


class Side:
    """Tensor ranks that do one step when they are asked to.

    Args:
        tree: the checkout that they import.
        num_ranks: how many.
        dtype: `precision.dtype`.
    """

    def __init__(self, tree: Path, num_ranks: int, dtype: str) -> None:
        environment = os.environ | {
            "PYTHONPATH": f"{tree}:{tree / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
        }
        overrides = [f"precision.dtype={dtype}", f"parallel.tensor={num_ranks}"]
        self._place = tempfile.TemporaryDirectory(prefix="phi4-side-")
        self._ranks = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", _WORKER, self._place.name),
                    *(str(rank), str(num_ranks), *overrides),
                ],
                cwd=tree,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_ranks)
        ]
        for rank in self._ranks:
            while _answer(rank) != ["ready"]:
                pass  # what libraries print while they are imported

    def step(self, index: int) -> tuple[float, float, float]:
        """Of one optimizer step: the slowest rank's wall seconds, all CPU seconds, the loss."""
        for rank in self._ranks:
            print(index, file=rank.stdin, flush=True)
        walls, cpus, losses = zip(*(map(float, _answer(rank)) for rank in self._ranks), strict=True)
        return max(walls), sum(cpus), losses[0]

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.stdin.close()
        for rank in self._ranks:
            rank.wait()
        self._place.cleanup()


def _answer(rank: subprocess.Popen) -> list[str]:
    line = rank.stdout.readline()
    if not line:
        raise RuntimeError(f"a side ended with {rank.wait()}; its error is above")
    return line.split()


def name_of(commit: str) -> str:
    """Return the commit's abbreviated hash."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short=12", commit]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@contextmanager
def checkout_of(commit: str) -> Iterator[Path]:
    """The tree of a commit in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="phi4-before-") as name:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit], check=True, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", name], check=True, input=archive.stdout)
        yield Path(name)


def time_pairs(sides: Sequence[Side], pairs: int) -> tuple[np.ndarray, list[float]]:
    """Wall and CPU seconds [pairs, sides, 2], and the losses of the last step before them."""
    times = np.empty((pairs, 2, 2))
    for index in range(WARM_UP_STEPS):
        losses = [side.step(index)[2] for side in sides]
    for index in range(pairs):
        for which in (1, 0) if index % 2 else (0, 1):
            times[index, which] = sides[which].step(WARM_UP_STEPS + index)[:2]
    for side in sides:
        side.close()
    return times, losses


def interval_over_starts(ratios: np.ndarray) -> list[float]:
    """Median of [starts, pairs], and the ends of its 95% bootstrap interval over whole starts."""
    draws = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    medians = np.median(ratios[draws].reshape(10_000, -1), axis=1)
    return [round(float(x), 4) for x in (np.median(ratios), *np.percentile(medians, [2.5, 97.5]))]


def compare(
    commit: str, pairs: int, *, after: str | None, num_ranks: int, dtype: str
) -> dict[str, object]:
    """Return the row: median ratio of a later step time to the commit's, with its interval.

    Args:
        commit: the earlier one.
        pairs: how many steps each side is timed for, over all starts.
        after: the later one; None is this checkout.
        num_ranks: tensor ranks of each side.
        dtype: dtype of the recipe.
    """
    later = nullcontext(ROOT) if after is None else checkout_of(after)
    with checkout_of(commit) as before, later as tree:
        starts = []
        for _ in range(STARTS):
            sides = [Side(root, num_ranks, dtype) for root in (tree, before)]
            times, losses = time_pairs(sides, pairs // STARTS)
            starts.append(times)
    wall, cpu = np.moveaxis(np.stack(starts), -1, 0)
    ratio, *interval = interval_over_starts(wall[..., 0] / wall[..., 1])
    cpu_ratio, *cpu_interval = interval_over_starts(cpu[..., 0] / cpu[..., 1])
    return {
        "before": name_of(commit),
        "after": "the checkout" if after is None else name_of(after),
        "dtype": dtype,
        "tensor": num_ranks,
        "ratio": ratio,
        "ratio_95": interval,
        "cpu_ratio": cpu_ratio,
        "cpu_ratio_95": cpu_interval,
        "loss_difference": abs(losses[0] - losses[1]) / losses[1],
        "pairs": pairs // STARTS * STARTS,
        "starts": STARTS,
    }


def main() -> None:
    """Command line; exit code 1 when a ratio is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what to compare this checkout with")
    parser.add_argument("--after", help="a commit to measure instead of this checkout")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["fp32"])
    parser.add_argument(
        "--tensor", type=int, nargs="+", default=[1], help="tensor ranks, a processor each"
    )
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--limit", type=float, default=math.inf, help="of every ratio")
    parser.add_argument("--json", type=Path, help="append the row to this file")
    options = parser.parse_args()
    # Before the first row is written, which changes the checkout.
    made = provenance()
    is_over = False
    for num_ranks, dtype in product(options.tensor, options.dtype):
        row = compare(
            options.commit, options.pairs, after=options.after, num_ranks=num_ranks, dtype=dtype
        )
        is_over |= row["ratio"] > options.limit
        row |= {"commit": made["commit"]}
        print(json.dumps(row), flush=True)
        if options.json:
            append_row(options.json, row)
    raise SystemExit(is_over)


if __name__ == "__main__":
    main()
