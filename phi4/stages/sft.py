"""Supervised fine-tuning: the next-token loss over the assistant's tokens of conversations.

The loss mask is stored with the conversations: it covers the assistant's tokens and the
`<|im_end|>` after them.

Source: report, section 4.1.
"""

from collections.abc import Iterator

from phi4.config import Recipe
from phi4.stages.pretrain import NextToken
from phi4.stages.stage import Stage, starts_from_weights


def _keeps_conversations_whole(recipe: Recipe) -> Iterator[str]:
    for source in (*recipe.data.sources, *recipe.data.held_out):
        if source.overlong == "cut":
            yield (
                f"source {source.name!r} has overlong=cut, but a row that begins inside an answer "
                f"would train it without its question; use truncate or drop"
            )


STAGE = Stage(
    make_objective=lambda recipe: NextToken(),
    source_kinds=frozenset(("conversations",)),
    rules=(starts_from_weights, _keeps_conversations_whole),
)
