"""Step time of pivots in one forward pass against two sequences each, on one CPU thread.

Both sides train the same pairs of single tokens against the same cached references. One puts each
trajectory into a row once. The other has for each pivot the prompt with the chosen token and the
prompt with the rejected one, as DPO on pairs does; they fill a row per trajectory without a gap.
Pairs of steps are interleaved, so what else runs on the machine meets both sides alike.

    python -m tools.dpo_one_forward --pairs 40 --json benchmarks/dpo_one_forward.jsonl
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi4.config import DpoConfig, Recipe, with_overrides
from phi4.data.stream.batch import Batch
from phi4.engine.engine import Engine
from phi4.engine.platform import connect, disconnect
from phi4.engine.step_values import StepResult
from phi4.stages.dpo import PreferenceLoss
from phi4.verify.measured_rows import append_row, provenance
from tests.support.pair_rows import Row, Trajectory, pair_batch
from tools.step_time import ratio_interval, time_steps

NUM_PIVOTS = 4
"""Per trajectory."""
LIMIT = 0.3
"""Of the ratio of times. By tokens it would be 1 / (2 * NUM_PIVOTS) with all pivots at the end."""
TOLERANCE = 1e-6
"""Of the loss and of the gradient's norm."""

_TRAJECTORIES, _TOKENS = 4, 256
_RECIPE = f"""
model.num_layers=4 model.hidden_size=128 model.num_attention_heads=8 model.num_key_value_heads=2
model.intermediate_size=448 model.vocab_size=512 model.max_position_embeddings={_TOKENS}
data.sequence_length={_TOKENS} data.unit_tokens={_TOKENS} batch.global_batch_size={_TRAJECTORIES}
precision.dtype=fp32
"""


def drawn_trajectories(vocab_size: int, step: int) -> list[Trajectory]:
    """Of _TOKENS tokens, with a pivot after each eighth of the second half."""
    random = np.random.default_rng(step)
    positions = _TOKENS - 1 - _TOKENS // (2 * NUM_PIVOTS) * np.arange(NUM_PIVOTS)[::-1]
    found = []
    for _ in range(_TRAJECTORIES):
        ids = random.integers(1, vocab_size, _TOKENS)
        chosen, rejected = random.integers(1, vocab_size, (2, NUM_PIVOTS))
        references = random.normal(-6, 1, (NUM_PIVOTS, 2))
        found.append(Trajectory(ids, positions, chosen, rejected, references))
    return found


def micro_batches(rows: Sequence[Row]) -> list[Batch]:
    """Return a micro-batch per row, as long as what is in it."""
    lengths = [sum(len(d.tokens) for item in row for d in item.documents()) for row in rows]
    return [pair_batch([row], length) for row, length in zip(rows, lengths, strict=True)]


def both_forms(vocab_size: int, step: int) -> tuple[list[Batch], list[Batch]]:
    """Return the pairs of a step in one forward, and as two sequences each."""
    trajectories = drawn_trajectories(vocab_size, step)
    once = micro_batches([[trajectory] for trajectory in trajectories])
    return once, micro_batches([trajectory.as_pairs() for trajectory in trajectories])


def check_agreement(one: StepResult, two: StepResult) -> None:
    """Refuse to time what is not the same.

    Raises:
        RuntimeError: number of pairs, loss or gradient norm differ.
    """
    errors = (one.loss / two.loss - 1, one.grad_norm / two.grad_norm - 1)
    if one.weight != two.weight or not max(map(abs, errors)) <= TOLERANCE:
        raise RuntimeError(f"the two forms differ: {one} and {two}")


def compare(pairs: int) -> dict[str, Any]:
    """Time pairs of steps; see the module."""
    recipe = with_overrides(Recipe(), _RECIPE.split())
    engine = Engine(recipe, connect("cpu", threads=recipe.run.threads))
    objective, forms_of = PreferenceLoss(DpoConfig()), partial(both_forms, recipe.model.vocab_size)

    def step(forms: tuple[list[Batch], list[Batch]], form: int, rate: float = 1e-6) -> StepResult:
        return engine.train_step(forms[form], objective, learning_rate=rate)

    for index in range(3):
        check_agreement(*(step(forms_of(index), form, rate=0.0) for form in (0, 1)))
    times = time_steps([partial(step, form=form) for form in (0, 1)], forms_of, pairs)
    tokens = [sum(batch.tokens.size for batch in form) for form in forms_of(0)]
    engine.close()
    disconnect()
    one_ms, two_ms = (np.median(times[..., 0], axis=0) * 1e3).round(2).tolist()
    ratio, *interval = ratio_interval(*times[..., 0].T)
    cpu_ratio, *cpu_interval = ratio_interval(*times[..., 1].T)
    return {
        "ratio": ratio,
        "ratio_95": interval,
        "cpu_ratio": cpu_ratio,
        "cpu_ratio_95": cpu_interval,
        "token_ratio": round(tokens[0] / tokens[1], 4),
        "one_forward_ms": one_ms,
        "two_sequences_ms": two_ms,
        "pivots_per_trajectory": NUM_PIVOTS,
        "pairs": pairs,
        "limit": LIMIT,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Command line; exit code 1 when the ratio is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--json", type=Path, help="append the row to this file")
    options = parser.parse_args()
    row = compare(options.pairs)
    print(json.dumps(row | provenance()))
    if options.json:
        append_row(options.json, row)
    raise SystemExit(row["ratio"] > LIMIT)


if __name__ == "__main__":
    main()
