"""Write tests/golden/losses.json: what the tiny recipe's first steps cost on one process.

Run through `make golden`, never by a test, after a change that is intended to change the numbers.
"""

import json
from pathlib import Path

from phi4.config import load_recipe
from phi4.engine.engine import Engine
from phi4.engine.platform import connect, disconnect
from phi4.stages.pretrain import NextToken
from phi4.verify.layouts import reference_case
from phi4.verify.parity import LEARNING_RATE, micro_batches

RECIPE = Path("examples/recipes/tiny_pretrain.toml")
GOLDEN = Path("tests/golden/losses.json")
STEPS = 5


def measure() -> list[float]:
    """Losses of the first steps on the parity batches, one process, fp32."""
    recipe = reference_case(load_recipe(RECIPE)).recipe
    engine = Engine(recipe, connect("cpu"))
    losses = [
        engine.train_step(
            micro_batches(recipe, step, 0, 1), NextToken(), learning_rate=LEARNING_RATE
        ).loss
        for step in range(STEPS)
    ]
    engine.close()
    disconnect()
    return losses


def main() -> None:
    """Write the file."""
    losses = measure()
    GOLDEN.write_text(json.dumps({RECIPE.name: losses}, indent=1) + "\n")
    print(f"{GOLDEN}: {losses}")


if __name__ == "__main__":
    main()
