"""What the numerics guard costs a training step, on one CPU thread.

Interleaved pairs of the same step with the guard and without it, in one process, and the time that
the training thread spends in the guard's functions, by its own clock.

    python -m tools.guard_cost --pairs 60 --json benchmarks/guard_cost.jsonl
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from phi4_kernels.grad_norm import clip_factor

from phi4.config import Recipe, with_overrides
from phi4.data.stream.batch import Batch
from phi4.engine.engine import Engine
from phi4.engine.optimizer import adamw
from phi4.engine.optimizer.adamw import CLIP_EPS, OnePassChain
from phi4.engine.platform import connect, disconnect
from phi4.engine.replicas import check_replicas, require_finite_parameters
from phi4.engine.step_values import Totals
from phi4.rundir.state import Numerics, RunState
from phi4.stages.pretrain import NextToken
from phi4.train.hooks import Progress
from phi4.train.reliability.guard import NumericsGuard
from phi4.train.reliability.spikes import SpikeDetector
from phi4.verify.measured_rows import append_row, provenance
from tools.step_time import host_batches, ratio_interval

LARGEST_SHARE = 0.005
"""Of a step's time, of the thread's clock."""
LARGEST_RATIO = 1.02
"""Upper end of the 95% interval of the pairs' ratio."""

# The model of examples/recipes/tiny_pretrain.toml on one process, and half of its batch. The limit
# is far off, because the window is filled with copies of one step; it costs the same to look at.
_RECIPE = """
model.num_layers=8 model.hidden_size=64 model.num_attention_heads=8 model.num_key_value_heads=2
model.intermediate_size=224 model.vocab_size=2048 model.max_position_embeddings=256
model.init_std=0.05 data.sequence_length=128 data.unit_tokens=128 batch.global_batch_size=8
batch.micro_batch_size=4 optim.learning_rate=1e-4 optim.clip_grad=1.0 precision.dtype=fp32
reliability.spike_deviations=10000
"""


class GuardedLoop:
    """What the training loop does per step that the guard is part of.

    Attributes:
        guard_seconds: thread time, in the guard's functions, of every guarded step.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.engine = Engine(recipe, connect("cpu", threads=1))
        section = recipe.reliability
        self._rate = recipe.optim.learning_rate
        self._spikes = SpikeDetector(section.spike_deviations, section.spike_window)
        self._guard = NumericsGuard(SimpleNamespace(recipe=recipe, engine=self.engine))
        self._state = RunState()
        self.guard_seconds: list[float] = []

    def guarded(self, batches: Sequence[Batch]) -> None:
        """A step with the guard."""
        spent = [0.0]
        with _timed(spent):
            before = time.thread_time()
            limits = self._spikes.limits(self._state.numerics)
            spent[0] += time.thread_time() - before
            result = self.engine.train_step(
                batches, NextToken(), learning_rate=self._rate, limits=limits
            )
            before = time.thread_time()
            self._state = msgspec.structs.replace(
                self._state,
                step=self._state.step + 1,
                numerics=self._spikes.following(self._state.numerics, result),
            )
            self._guard.act(
                Progress(self._state, self._state.step + 1, 0, 0.0, 0.0, result, batches)
            )
            spent[0] += time.thread_time() - before
        if not result.updated:
            raise RuntimeError(f"step {self._state.step} of the benchmark is bad: {result}")
        self.guard_seconds.append(spent[0])

    def fill_window(self, num_steps: int) -> None:
        """Simulate a number of steps like the last one, with some noise."""
        past = self._state.numerics
        noise = np.random.default_rng(1).normal(0.0, 0.01, (2, num_steps))
        full = (np.array([[past.losses[-1]], [past.log_norms[-1]]]) + noise).tolist()
        self._state = msgspec.structs.replace(
            self._state, numerics=Numerics(tuple(full[0]), tuple(full[1]))
        )

    def unguarded(self, batches: Sequence[Batch]) -> None:
        """The same step without it."""
        with (
            mock.patch.object(OnePassChain, "step", _unguarded_step),
            mock.patch.object(Totals, "loss_within", lambda *_: None),
        ):
            self.engine.train_step(batches, NextToken(), learning_rate=self._rate)

    def check_ms(self) -> dict[str, float]:
        """Median thread milliseconds of the checks that are not made every step."""

        def median_ms(check: Callable[[Engine], None]) -> float:
            times = []
            for _ in range(15):
                before = time.thread_time()
                check(self.engine)
                times.append(time.thread_time() - before)
            return round(float(np.median(times)) * 1e3, 3)

        return {
            "replica_check_ms": median_ms(check_replicas),
            "finite_check_ms": median_ms(require_finite_parameters),
        }


@torch.no_grad()
def _unguarded_step(self: OnePassChain, *_: object) -> tuple[bool, float, None]:
    """`OnePassChain.step` where only a gradient that is not finite updates nothing."""
    self.prepare_grads()
    total = self.square_sum()
    grad_scale = clip_factor(total, self.config.clip_grad, CLIP_EPS)
    found_inf = (~total.isfinite()).float()
    for optimizer in self.chained_optimizers:
        optimizer.update(grad_scale, found_inf)
    norm = math.sqrt(float(total))
    return math.isfinite(norm), norm, None


@contextmanager
def _timed(spent: list[float]) -> Iterator[None]:
    """Add the time of the guard's parts within the step."""

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            before = time.thread_time()
            result = call(*args)
            spent[0] += time.thread_time() - before
            return result

        return run

    with ExitStack() as stack:
        for owner, name in ((adamw, "norm_within"), (Totals, "loss_within")):
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield


def measure(pairs: int) -> dict[str, Any]:
    """Interleaved pairs, every other one in the other order, once the window is full."""
    recipe = with_overrides(Recipe(), _RECIPE.split())
    loop = GuardedLoop(recipe)
    for index in range(4):
        loop.guarded(host_batches(recipe, 1, index))
    loop.fill_window(recipe.reliability.spike_window)
    loop.guard_seconds.clear()
    times = np.empty((pairs, 2, 2))
    sides = (loop.guarded, loop.unguarded)
    for index in range(pairs):
        batches = host_batches(recipe, 1, index)
        for side in (1, 0) if index % 2 else (0, 1):
            start = time.perf_counter(), time.thread_time()
            sides[side](batches)
            times[index, side] = np.subtract((time.perf_counter(), time.thread_time()), start)
    checks = loop.check_ms()
    step_ms = float(np.median(times[:, 1, 1])) * 1e3
    guard_ms = float(np.median(loop.guard_seconds)) * 1e3
    guard_ms += checks["replica_check_ms"] / recipe.reliability.replica_check_every
    loop.engine.close()
    disconnect()
    ratio, *interval = ratio_interval(*times[..., 0].T)
    thread_ratio, *thread_interval = ratio_interval(*times[..., 1].T)
    return {
        "benchmark": "guard_cost",
        "guard_share": round(guard_ms / step_ms, 5),
        "guard_ms": round(guard_ms, 4),
        "step_thread_ms": round(step_ms, 2),
        "ratio": ratio,
        "ratio_95": interval,
        "thread_ratio": thread_ratio,
        "thread_ratio_95": thread_interval,
        **checks,
        "pairs": pairs,
        "model": "8 layers x 64 hidden, vocabulary 2048, 8 rows of 128 tokens, fp32, one rank",
    }


def main() -> int:
    """Command line; exit 1 where the guard takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--json", type=Path, help="append the row to this file")
    args = parser.parse_args()
    row = measure(args.pairs)
    print(json.dumps(row | provenance()))
    if args.json:
        append_row(args.json, row)
    return int(row["guard_share"] > LARGEST_SHARE or row["ratio_95"][1] > LARGEST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
