"""A training loop of your own: `python examples/train_loop.py`, on a CPU or one GPU.

`phi4 train` adds to this loop what a long run needs: data, checkpoints, hooks, many processes.
"""

import numpy as np

from phi4.config import parse_recipe
from phi4.data.stream.batch import build_batch
from phi4.engine.engine import Engine
from phi4.engine.platform import connect, disconnect
from phi4.stages import stage_of

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


def main(steps: int = 20) -> list[float]:
    """Teach a small Phi-4 to count; the loss of each step."""
    recipe = parse_recipe(RECIPE)
    engine = Engine(recipe, connect("auto"))
    objective = stage_of(recipe).make_objective(recipe)
    rng, losses = np.random.default_rng(0), []
    for step in range(steps):
        rows = (rng.integers(1, 64, (8, 1)) + np.arange(33)) % 63 + 1
        weights = np.ones((8, 32), np.float32)
        batch = build_batch(rows[:, :-1], rows[:, 1:], weights, eod_id=0)
        result = engine.train_step([batch], objective, learning_rate=3e-3)
        losses.append(result.loss)
        print(f"step {step + 1:3}  loss {result.loss:.3f}  gradient norm {result.grad_norm:.3f}")
    engine.close()
    disconnect()
    return losses


if __name__ == "__main__":
    main()
