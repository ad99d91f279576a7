"""Midtraining: pretraining's loss, from trained weights, with longer rows and another RoPE base.

Source: report, section 3.3.
"""

from collections.abc import Iterator

from phi4.config import Recipe
from phi4.stages.pretrain import NextToken
from phi4.stages.stage import Stage


def _starts_from_weights(recipe: Recipe) -> Iterator[str]:
    if recipe.run.init_from is None:
        yield (
            "run.stage=midtrain continues trained weights, and run.init_from is not set; name a "
            "checkpoint or a run, or use run.stage=pretrain"
        )


STAGE = Stage(
    make_objective=lambda recipe: NextToken(),
    source_kinds=frozenset(("stream", "windows")),
    rules=(_starts_from_weights,),
)
