"""Pretraining: next-token loss over every token whose label counts."""

import torch

from phi4.engine.objective import Loss, SegmentSum
from phi4.stages.stage import Stage


class NextToken:
    """Mean negative log-likelihood over the tokens of the global batch.

    Source: report, section 3; labels after an end of document have weight 0.
    """

    metric_names: tuple[str, ...] = ()

    def __call__(
        self, log_probs_BS: torch.Tensor, loss_mask_BS: torch.Tensor, segment_sum: SegmentSum
    ) -> Loss:
        """See `phi4.engine.objective.Objective`; sums in fp64."""
        loss_sum = -(log_probs_BS * loss_mask_BS).sum(dtype=torch.float64)
        return Loss(loss_sum, loss_mask_BS.sum(dtype=torch.float64))


STAGE = Stage(
    make_objective=lambda recipe: NextToken(),
    source_kinds=frozenset(("stream", "windows")),
)
