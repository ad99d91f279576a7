"""Step time of this checkout beside that of an earlier commit, interleaved in one run.

Each side is a process of its own that imports its own tree and does the steps of tools/step_time.py
on one CPU thread. They take turns, and every other pair swaps the order, so what else runs on the
machine meets both alike.

    python tools/step_time_before.py COMMIT --pairs 200 --json benchmarks/step_time_before.jsonl
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from phi4.verify.measured_rows import append_row, provenance
from tools.step_time import ratio_interval

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 8
_WORKER = """
import sys, time
from tools.step_time import EngineLoop, benchmark_recipe, host_batches

loop = EngineLoop(benchmark_recipe(2))
batches = [host_batches(loop.engine.recipe, 1, index) for index in range(16)]
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter(), time.process_time()
    loss = loop(batches[int(line) % len(batches)])
    print(time.perf_counter() - start[0], time.process_time() - start[1], loss, flush=True)
"""


class Side:
    """A process that does one step when it is asked to.

    Args:
        tree: the checkout that it imports.
    """

    def __init__(self, tree: Path) -> None:
        environment = os.environ | {
            "PYTHONPATH": f"{tree}:{tree / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        while self._answer() != ["ready"]:
            pass  # what libraries print while they are imported

    def step(self, index: int) -> tuple[float, float, float]:
        """Wall seconds, CPU seconds and loss of one optimizer step."""
        print(index, file=self._process.stdin, flush=True)
        wall, cpu, loss = map(float, self._answer())
        return wall, cpu, loss

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> list[str]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with {self._process.wait()}; its error is above")
        return line.split()


@contextmanager
def checkout_of(commit: str) -> Iterator[Path]:
    """The tree of a commit in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="phi4-before-") as name:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit], check=True, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", name], check=True, input=archive.stdout)
        yield Path(name)


def compare(commit: str, pairs: int) -> dict[str, object]:
    """The row: median ratio of this checkout's step time to the commit's, with its interval."""
    times = np.empty((pairs, 2, 2))
    with checkout_of(commit) as before:
        sides = [Side(ROOT), Side(before)]
        for index in range(WARM_UP_STEPS):
            losses = [side.step(index)[2] for side in sides]
        for index in range(pairs):
            for which in (1, 0) if index % 2 else (0, 1):
                times[index, which] = sides[which].step(WARM_UP_STEPS + index)[:2]
        for side in sides:
            side.close()
    ratio, *interval = ratio_interval(*times[..., 0].T)
    cpu_ratio, *cpu_interval = ratio_interval(*times[..., 1].T)
    return {
        "before": commit,
        "ratio": ratio,
        "ratio_95": interval,
        "cpu_ratio": cpu_ratio,
        "cpu_ratio_95": cpu_interval,
        "loss_difference": abs(losses[0] - losses[1]) / losses[1],
        "pairs": pairs,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what to compare this checkout with")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--json", type=Path, help="append the row to this file")
    options = parser.parse_args()
    row = compare(options.commit, options.pairs)
    print(json.dumps(row | provenance()))
    if options.json:
        append_row(options.json, row)


if __name__ == "__main__":
    main()
