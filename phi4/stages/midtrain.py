"""Midtraining: pretraining's loss, from pretrained weights, with longer rows and another RoPE base.

Source: report, section 3.3.
"""

from phi4.stages.pretrain import NextToken
from phi4.stages.stage import Stage, starts_from_weights

STAGE = Stage(
    make_objective=lambda recipe: NextToken(),
    source_kinds=frozenset(("stream", "windows")),
    rules=(starts_from_weights,),
)
