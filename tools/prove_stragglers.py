"""Stragglers in real runs: two data ranks for 1,000 steps, and one of them made twice as slow.

python -m tools.prove_stragglers

The slow rank computes for as long again after each forward pass. Windows are as long as by
default.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

_OVERRIDES = (
    "model.num_layers=2",
    "batch.global_batch_size=8",
    "data.held_out=[]",
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.sequence=false",
    "parallel.data=2",
    "checkpoint.every=0",
    "tracking.mlflow=false",
)

_SLOW_RANK = """
import os, sys, threading, time

def slow_down():
    while "phi4.train.session" not in sys.modules:
        time.sleep(0.01)
    from phi4.engine.model.gpt import Phi4Model
    run = Phi4Model.run
    def twice(*args, **options):
        begun = time.thread_time()
        out = run(*args, **options)
        end = 2 * time.thread_time() - begun
        while time.thread_time() < end:
            pass
        return out
    Phi4Model.run = twice

if os.environ.get("RANK") == "1":
    threading.Thread(target=slow_down, daemon=True).start()
"""


def train(steps: int, directory: Path, *, has_slow_rank: bool) -> tuple[list[str], list[float]]:
    """Run to its end: the lines about stragglers, and the largest factor of each comparison."""
    run_dir = directory / "run"
    environment = dict(os.environ)
    if has_slow_rank:
        (directory / "sitecustomize.py").write_text(_SLOW_RANK)
        environment["PYTHONPATH"] = f"{directory}:{environment.get('PYTHONPATH', '')}"
    words = ("train", "examples/recipes/tiny_pretrain.toml", *_OVERRIDES)
    command = [sys.executable, "-m", "phi4", *words, f"run.steps={steps}", f"run.dir={run_dir}"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    said = re.findall(r"straggler: .*", result.stdout)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return said, [row["slowest_rank_factor"] for row in rows if "slowest_rank_factor" in row]


def main() -> int:
    """Exit 1 where the healthy run names a rank, or the other run does not name rank 1 alone."""
    with tempfile.TemporaryDirectory(prefix="phi4_stragglers_") as healthy:
        said, factors = train(1000, Path(healthy), has_slow_rank=False)
    print(
        f"healthy: {len(factors)} comparisons, largest factor {max(factors):.2f}", *said, sep="\n"
    )
    with tempfile.TemporaryDirectory(prefix="phi4_stragglers_") as slow:
        said_of_slow, slow_factors = train(300, Path(slow), has_slow_rank=True)
    print(*said_of_slow, sep="\n")
    is_named = len(said_of_slow) == 1 and "rank 1 on " in said_of_slow[0]
    print(
        f"1,000 healthy steps name {len(said)} ranks (largest factor {max(factors):.2f}); a rank "
        f"twice as slow is {'named' if is_named else 'NOT named'} (factors up to "
        f"{max(slow_factors):.2f})"
    )
    return 0 if is_named and not said else 1


if __name__ == "__main__":
    sys.exit(main())
