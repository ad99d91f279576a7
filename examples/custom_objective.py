"""A loss of your own: `python examples/custom_objective.py` learns which of two answers is better.

Chosen and rejected answers are packed into one row. The loss sees one log-probability per segment,
whatever layout the engine has: the same class trains under tensor, pipeline, context and data
parallelism, even where a segment is split over ranks.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from phi4.config import parse_recipe
from phi4.config.gradient_form import GradientForm
from phi4.data.stream.batch import Batch, build_batch
from phi4.engine.engine import Engine
from phi4.engine.objective import Loss, LossInputs, SegmentSum
from phi4.engine.platform import connect, disconnect

RECIPE = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    },
    "precision": {"dtype": "fp32"},
    "data": {"sequence_length": 32, "unit_tokens": 32},
}
PAIRS_PER_ROW = 2
ANSWER_TOKENS = 8


class Preference:
    """-log sigmoid(log p(chosen) - log p(rejected)), a mean over the pairs of the global batch.

    Segment 2i is the chosen answer of pair i, segment 2i + 1 the rejected one.
    """

    metric_names = ("accuracy",)
    gradient: GradientForm = "any"

    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        """Return the sums of one micro-batch."""
        log_probs_N = segment_sum(inputs.log_probs_BS * inputs.loss_mask_BS)
        margins_P = log_probs_N[0::2] - log_probs_N[1::2]
        num_pairs = inputs.segment_total(torch.ones_like(margins_P))
        num_right = inputs.segment_total((margins_P > 0).double())
        loss_sum = inputs.segment_total(-F.logsigmoid(margins_P))
        return Loss(loss_sum, num_pairs, {"accuracy": (num_right, num_pairs)})


def batches(num_steps: int) -> Iterator[Batch]:
    """Rows of two pairs: the chosen answer counts up, the rejected one counts down."""
    rng, columns = np.random.default_rng(0), np.arange(ANSWER_TOKENS + 1)
    for _ in range(num_steps):
        starts = rng.integers(10, 54, (4, PAIRS_PER_ROW))
        answers = np.stack([starts[..., None] + columns, starts[..., None] - columns], axis=2)
        first = np.zeros(ANSWER_TOKENS, dtype=bool)
        first[0] = True
        tokens, labels = answers[..., :-1].reshape(4, -1), answers[..., 1:].reshape(4, -1)
        begins = np.tile(first, (4, 2 * PAIRS_PER_ROW))
        batch = build_batch(tokens, labels, np.ones_like(tokens), eod_id=0, starts=begins)
        num_segments = tokens.size // ANSWER_TOKENS
        segments = np.arange(num_segments).repeat(ANSWER_TOKENS).reshape(tokens.shape)
        yield replace(batch, segment_ids=segments, num_segments=num_segments)


def main(steps: int = 10) -> list[float]:
    """Train; the share of pairs that are ranked right, of each step."""
    engine = Engine(parse_recipe(RECIPE), connect("auto"))
    accuracies = []
    for batch in batches(steps):
        result = engine.train_step([batch], Preference(), learning_rate=3e-4)
        accuracies.append(result.metrics["accuracy"])
        print(f"loss {result.loss:.3f} over {result.weight:.0f} pairs, {accuracies[-1]:.0%} right")
    engine.close()
    disconnect()
    return accuracies


if __name__ == "__main__":
    main()
