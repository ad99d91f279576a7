"""Training in FP8 comes to the loss of training in bf16, and resumes bit for bit.

    python -m tools.prove_fp8 --json benchmarks/fp8.jsonl

Trains examples/recipes/tiny_fp8.toml on one process, with every way to scale and without FP8, over
seeds. Compared is the mean loss of the last 20 steps, seed by seed. The resumption is in the
recipe's own layout, as far as the sizes allow.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4.rundir.names import METRICS_FILE
from phi4.rundir.step_log import read_metrics
from phi4.verify.measured_rows import append_row, provenance

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "recipes" / "tiny_fp8.toml"
_NO_TENSOR_RANKS = ("parallel.tensor=1", "parallel.sequence=false")
SCALINGS = {"tensorwise": (), "rowwise": (), "blockwise": _NO_TENSOR_RANKS}
"""And how the recipe's layout is changed for the resumption: a tensor rank's part of attention is
narrower than a block."""
LARGEST_DIFFERENCE = 0.01
LAST_STEPS = 20

_ONE_PROCESS = (*_NO_TENSOR_RANKS, "parallel.pipeline=1")
_LOSSES_ONLY = ("checkpoint.every=0", "evaluation.every=0", "tracking.mlflow=false")
_SHOWN = 300


@dataclass(frozen=True)
class Proof:
    """What is trained.

    Attributes:
        recipe: with precision.fp8 on.
        directory: that its paths start from.
        steps: steps of every run.
        seeds: seeds of the weights and of the data's order.
    """

    recipe: Path
    directory: Path
    steps: int
    seeds: Sequence[int]

    def final_losses(self, *overrides: str) -> list[float]:
        """By seed."""
        return [self._final_loss(seed, overrides) for seed in self.seeds]

    def resumes(self, *overrides: str, steps: int = 10) -> bool:
        """Return whether a run that was interrupted has the bits of one that was not."""
        words = ("verify", "resume", str(self.recipe), *overrides, f"--steps={steps}")
        result = self._phi4(*words)
        # A refusal has no verdict, and its reason in the other stream.
        print((result.stdout or result.stderr).strip().splitlines()[-1], flush=True)
        return result.returncode == 0

    def _final_loss(self, seed: int, overrides: Sequence[str]) -> float:
        with tempfile.TemporaryDirectory(prefix="phi4_fp8_") as run_dir:
            words = (*_ONE_PROCESS, *_LOSSES_ONLY, *overrides)
            result = self._phi4(
                *("train", str(self.recipe), *words),
                *(f"run.seed={seed}", f"run.steps={self.steps}", f"run.dir={run_dir}/run"),
            )
            if result.returncode:
                raise RuntimeError(f"{' '.join(words)} failed: {result.stderr[-_SHOWN:]}")
            lines = read_metrics(Path(run_dir) / "run" / METRICS_FILE)
        loss = statistics.fmean(line["loss"] for line in lines[-LAST_STEPS:])
        print(f"seed {seed} {' '.join(overrides)}: {loss:.4f}", flush=True)
        return loss

    def _phi4(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "phi4", *words],
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )


def compared(
    proof: Proof, scaling: str, losses: Sequence[float], bf16: Sequence[float], *, resumes: bool
) -> dict[str, Any]:
    """Return the row of a way to scale.

    Args:
        proof: what was trained.
        scaling: value of precision.fp8_recipe.
        losses: with it, by seed.
        bf16: without FP8.
        resumes: whether it does so bit for bit.
    """
    differences = [loss / without - 1 for loss, without in zip(losses, bf16, strict=True)]
    is_close = all(abs(difference) <= LARGEST_DIFFERENCE for difference in differences)
    return {
        "benchmark": "fp8",
        "recipe": proof.recipe.stem,
        "fp8_recipe": scaling,
        "steps": proof.steps,
        "seeds": list(proof.seeds),
        "loss": [round(loss, 4) for loss in losses],
        "bf16_loss": [round(loss, 4) for loss in bf16],
        "difference": [round(difference, 5) for difference in differences],
        "resumes_bitwise": resumes,
        "passed": is_close and resumes,
    }


def main() -> int:
    """Command line; exit 1 where a loss is too far off or a resumption differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append a row per way to scale to this file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scalings", nargs="+", choices=SCALINGS, default=list(SCALINGS))
    options = parser.parse_args()
    commit = provenance()["commit"]
    proof = Proof(RECIPE, ROOT, options.steps, options.seeds)
    bf16 = proof.final_losses("precision.fp8=off")
    num_failed = 0
    for scaling in options.scalings:
        override = f"precision.fp8_recipe={scaling}"
        losses = proof.final_losses(override)
        resumes = proof.resumes(override, *SCALINGS[scaling])
        row = compared(proof, scaling, losses, bf16, resumes=resumes)
        print(json.dumps(row), flush=True)
        num_failed += not row["passed"]
        if options.json:
            append_row(options.json, {"commit": commit, **row})
    print(
        f"fp8: {len(options.scalings) - num_failed} of {len(options.scalings)} ways to scale hold"
    )
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
