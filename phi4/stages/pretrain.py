"""Pretraining: the next-token loss over every token in the loss mask."""

from phi4.config.gradient_form import GradientForm
from phi4.engine.objective import Loss, LossInputs, SegmentSum
from phi4.stages.stage import Stage


class NextToken:
    """Mean negative log-likelihood over the tokens of the global batch.

    Source: report, section 3; labels after an end of document have weight 0.
    """

    metric_names: tuple[str, ...] = ()
    gradient: GradientForm = "masked_nll"

    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        """See `phi4.engine.objective.Objective`."""
        loss_mask_BS = inputs.loss_mask_BS
        loss_sum = -inputs.token_total(inputs.log_probs_BS * loss_mask_BS)
        return Loss(loss_sum, inputs.token_total(loss_mask_BS))


STAGE = Stage(
    make_objective=lambda recipe: NextToken(),
    source_kinds=frozenset(("stream", "windows")),
)
