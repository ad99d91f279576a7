"""The FP8 canary in training: a healthy run, a harmed one with its controls, and its cost.

Every run is of a small model on made-up text whose next token depends on the last two: of two
choices, or of one, so that the loss goes to almost 0. Healthy runs of each recipe show the worst of
every number that a limit holds. A harmed run has an outlier in one layer that changes nothing
without FP8; as controls the same without FP8, and with FP8 but without the canary.

    python -m tools.fp8_canary --steps 150 --seeds 1 --json benchmarks/fp8_canary.jsonl
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np

from phi4.config import Recipe, check, with_overrides
from phi4.data.stream.batch import Batch, build_batch
from phi4.engine.engine import Engine
from phi4.engine.platform import connect, disconnect
from phi4.stages.pretrain import NextToken
from phi4.train.fp8_canary import check_numbers, limits_of
from phi4.verify.measured_rows import append_row, provenance
from tests.support.fp8_plants import plant_outlier
from tools.step_time import ratio_interval

RECIPES = ("tensorwise", "rowwise", "blockwise")
EVERY = 20
HARMED_LAYER = 1
_SYMBOLS = 12
"""Few enough that a short run sees every pair of them often."""
_EOD = 0
# Sizes that blocks of 128 take. Two layers, both in FP8, so that each matters.
_RECIPE = """
model.num_layers=2 model.hidden_size=128 model.num_attention_heads=4 model.num_key_value_heads=2
model.intermediate_size=256 model.vocab_size=64 model.max_position_embeddings=64 model.init_std=0.08
data.sequence_length=64 data.unit_tokens=64 batch.global_batch_size=16 batch.micro_batch_size=4
precision.dtype=bf16 precision.fp8_end_layers_in_bf16=0
"""
_RATE = 3e-3
_LAST_SHARE = 0.1
"""Of a run's steps, whose mean loss is its final one."""
LARGEST_GAP = 0.01
"""Of the final loss beyond the one without FP8, where the canary watched."""


@dataclass
class Run:
    """What a run measured.

    Attributes:
        losses: losses of every step.
        worst: the worst value of each kind over all comparisons.
        fallbacks: (step, layer, reason).
    """

    losses: list[float] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    fallbacks: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """Mean over the last steps."""
        return float(np.mean(self.losses[-max(1, int(len(self.losses) * _LAST_SHARE)) :]))

    def note(self, numbers: dict[str, float]) -> None:
        """Keep the worst."""
        for key, value in numbers.items():
            kind = "/".join(key.split("/")[1:3]) if "flow" in key or "satur" in key else key
            if kind == "fp8/loss_gap":
                self._keep("loss_gap", abs(value))
            elif kind == "fp8/gradient_cosine":
                self._keep("1 - gradient_cosine", 1 - value)
            elif not kind.startswith("fp8/"):
                self._keep(kind, value)

    def _keep(self, kind: str, value: float) -> None:
        self.worst[kind] = max(self.worst.get(kind, 0.0), value)


class Text:
    """Rows whose next token is one of some that the last two tell.

    Args:
        seed: seed of the rows; the table is the same for all.
        choices: how many.
    """

    def __init__(self, seed: int, choices: int = 2) -> None:
        shape = (_SYMBOLS + 1, _SYMBOLS + 1, choices)
        self._next = np.random.default_rng(0).integers(1, _SYMBOLS + 1, shape)
        self._random = np.random.default_rng(seed)

    def batches(self, recipe: Recipe) -> list[Batch]:
        """Return the micro-batches of another step."""
        rows, length = recipe.batch.global_batch_size, recipe.data.sequence_length
        tokens = self._random.integers(1, _SYMBOLS + 1, (rows, length + 1))
        for at in range(2, length + 1):
            chosen = self._random.integers(0, self._next.shape[-1], rows)
            tokens[:, at] = self._next[tokens[:, at - 2], tokens[:, at - 1], chosen]
        size = recipe.batch.micro_batch_size
        ones = np.ones((size, length), dtype=np.float32)
        return [
            build_batch(tokens[i : i + size, :-1], tokens[i : i + size, 1:], ones, eod_id=_EOD)
            for i in range(0, rows, size)
        ]


@contextmanager
def engine_of(*overrides: str) -> Iterator[Engine]:
    """One process' engine of the model with these keys."""
    recipe = with_overrides(Recipe(), [*_RECIPE.split(), *overrides])
    check(recipe)
    engine = Engine(recipe, connect("cpu", threads=1))
    yield engine
    engine.close()
    disconnect()


def trained(text: Text, steps: int, seed: int, *overrides: str, harmed: bool = False) -> Run:
    """Train, with a comparison where the recipe asks for it."""
    run = Run()
    with engine_of(f"run.seed={seed}", *overrides) as engine:
        if harmed:
            plant_outlier(engine, HARMED_LAYER)
        precision = engine.recipe.precision
        every = precision.fp8_check_every if precision.fp8 == "torch" else 0
        for step in range(1, steps + 1):
            batches = text.batches(engine.recipe)
            rate = _RATE * min(1.0, step / 20) * (1 - step / (steps + 1))
            run.losses.append(engine.train_step(batches, NextToken(), learning_rate=rate).loss)
            if every and step % every == 0 and engine.fp8_layers:
                found = engine.check_fp8(batches, NextToken(), limits_of(precision))
                run.note(check_numbers(found))
                run.fallbacks += [(step, layer, why) for layer, why in found.fallbacks.items()]
                engine.leave_fp8([layer for _, layer, _ in run.fallbacks])
    return run


def healthy_row(fp8_recipe: str, choices: int, steps: int, seed: int) -> dict[str, Any]:
    """Return a run without injected faults."""
    keys = ("precision.fp8=torch", f"precision.fp8_recipe={fp8_recipe}")
    every = f"precision.fp8_check_every={EVERY}"
    run = trained(Text(seed, choices), steps, seed, *keys, every)
    return {
        "case": "healthy",
        "fp8_recipe": fp8_recipe,
        "choices": choices,
        "seed": seed,
        "steps": steps,
        "comparisons": steps // EVERY,
        "final_loss": round(run.final_loss, 4),
        "worst": {kind: round(value, 5) for kind, value in sorted(run.worst.items())},
        "fallbacks": run.fallbacks,
        "passed": not run.fallbacks,
    }


def harmed_row(steps: int, seed: int) -> dict[str, Any]:
    """A run with an outlier in one layer, and the same without FP8 and without the canary."""
    fp8, every = "precision.fp8=torch", "precision.fp8_check_every"
    plain, blind, run = (
        trained(Text(seed), steps, seed, *keys, harmed=True)
        for keys in ((), (fp8, f"{every}=0"), (fp8, f"{every}={EVERY}"))
    )
    gap, blind_gap = (one.final_loss / plain.final_loss - 1 for one in (run, blind))
    is_right = [(step, layer) for step, layer, _ in run.fallbacks] == [(EVERY, HARMED_LAYER)]
    return {
        "case": "harmed",
        "fp8_recipe": "tensorwise",
        "seed": seed,
        "steps": steps,
        "final_loss": round(run.final_loss, 4),
        "final_loss_without_fp8": round(plain.final_loss, 4),
        "final_loss_without_canary": round(blind.final_loss, 4),
        "fallbacks": run.fallbacks,
        "passed": is_right and abs(gap) <= LARGEST_GAP < blind_gap,
    }


def cost_row(pairs: int) -> dict[str, Any]:
    """A comparison's time over a step's, in interleaved pairs; and as passes of micro-batches."""
    steps, text = count(), Text(0)
    with engine_of("precision.fp8=torch") as engine:
        recipe, times = engine.recipe, np.empty((pairs, 2))
        limits = limits_of(recipe.precision)
        for index in range(-3, pairs):
            batches = text.batches(recipe)
            begun = time.perf_counter()
            engine.train_step(batches, NextToken(), learning_rate=_RATE / (1 + next(steps)))
            between = time.perf_counter()
            found = engine.check_fp8(batches, NextToken(), limits)
            if index >= 0:
                times[index] = between - begun, time.perf_counter() - between
    if found.fallbacks:
        raise RuntimeError(f"the run whose time was taken tripped: {found.fallbacks}")
    ratio, *interval = ratio_interval(times[:, 1], times[:, 0])
    num_micro_batches = recipe.batch.global_batch_size // recipe.batch.micro_batch_size
    every = recipe.precision.fp8_check_every
    return {
        "case": "cost",
        "check_over_step": ratio,
        "check_over_step_95": interval,
        "micro_batches_of_a_step": num_micro_batches,
        "passes_of_a_check": 2,
        "every": every,
        "share_of_training": round(ratio / every, 5),
        "pairs": pairs,
        "passed": True,
    }


def rows(steps: int, seeds: Sequence[int], pairs: int) -> Iterator[dict[str, Any]]:
    """Yield all rows."""
    for seed in seeds:
        for fp8_recipe, choices in product(RECIPES, (2, 1)):
            yield healthy_row(fp8_recipe, choices, steps, seed)
        # Longer, for the steps before its first comparison are to be made good.
        yield harmed_row(2 * steps, seed)
    yield cost_row(pairs)


def main() -> int:
    """Command line; exit 1 where a row fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    before, passed = provenance(), True
    for row in rows(args.steps, range(1, args.seeds + 1), args.pairs):
        print(json.dumps(row), flush=True)
        passed &= row["passed"]
        if args.json:
            append_row(args.json, {"benchmark": "fp8_canary", "commit": before["commit"], **row})
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
