"""Direct preference optimisation (DPO) over pairs of answers and over pivotal tokens.

Segments 2i and 2i + 1 of a micro-batch are the chosen and the rejected answer of pair i. A pivot is
a pair whose answers are two labels of one position: that position is segment 2i; segment 2i + 1 has
no positions and gets the log-probability of the second label. One forward pass thus serves all
pivots of a trajectory. The reference model's log-probabilities are part of the batch.

Source: Rafailov et al. 2023; report, section 4.2.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from phi4.config import DpoConfig, Recipe
from phi4.config.gradient_form import GradientForm
from phi4.engine.objective import Loss, LossInputs, SegmentSum
from phi4.errors import DataError
from phi4.stages.gate import start_gate
from phi4.stages.reference import check_reference
from phi4.stages.stage import Stage, starts_from_weights

# Shape legend: B rows, S columns of a context rank, N = 2 P segments, P pairs.

PairLoss = Callable[[torch.Tensor, DpoConfig], torch.Tensor]
"""Maps margins [P], fp64, to the loss of each pair [P]."""


def _sigmoid(margins_P: torch.Tensor, settings: DpoConfig) -> torch.Tensor:
    """Rafailov et al. 2023, equation 7; smoothing: Mitchell 2023, conservative DPO."""
    smoothing, logits_P = settings.label_smoothing, settings.beta * margins_P
    return -(1 - smoothing) * F.logsigmoid(logits_P) - smoothing * F.logsigmoid(-logits_P)


def _ipo(margins_P: torch.Tensor, settings: DpoConfig) -> torch.Tensor:
    """Azar et al. 2023, equation 17."""
    return (margins_P - 1 / (2 * settings.beta)).square()


def _hinge(margins_P: torch.Tensor, settings: DpoConfig) -> torch.Tensor:
    """Return the calibration loss of Zhao et al. 2023, on log-ratios."""
    return F.relu(1 - settings.beta * margins_P)


_LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "ipo": _ipo,
    "hinge": _hinge,
}
_PER_TOKEN = frozenset(("sigmoid_norm", "ipo"))
"""Losses whose log-ratios are means over an answer's tokens."""
_REMEDIES = {
    "reference": "write it with `phi4 dpo cache-ref`, and name it in data.reference_cache",
    "tokens_per_pair": "add the mean number of chosen loss tokens per pair of the global batch",
}
"""Extras that a batch must carry, and how to provide them."""


def _multiplies_as_the_reference(recipe: Recipe) -> Iterator[str]:
    if recipe.precision.fp8 != "off":
        yield (
            f"precision.fp8={recipe.precision.fp8} rounds the policy's log-probabilities but not "
            f"the reference's, which biases the margin; use precision.fp8=off"
        )


class PreferenceLoss:
    """Mean over the pairs of the global batch of `dpo.loss` and of the SFT term.

    Uses segment_extras["reference"] of a batch, the log-probability of each answer under the
    reference model [N], and with an SFT term segment_extras["tokens_per_pair"], the mean number of
    chosen loss tokens per pair of the global batch [N].

    The metrics have TRL's names and definitions: rewards are beta times the summed log-ratios,
    regardless of the loss. `logps/chosen_change` is log p(chosen) minus the reference's, which may
    fall while margins rise.
    """

    metric_names: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "logps/chosen_change",
    )
    gradient: GradientForm = "any"

    def __init__(self, settings: DpoConfig) -> None:
        self.settings = settings

    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        """See `phi4.engine.objective.Objective`.

        Raises:
            DataError: before `segment_sum`, when the batch lacks a reference or one side of a pair.
        """
        settings = self.settings
        _check(inputs, settings)
        log_probs_N = _log_probs(inputs, segment_sum)
        ratios_N = log_probs_N - _extra(inputs, "reference")
        compared_N = ratios_N
        if settings.loss in _PER_TOKEN:
            compared_N = ratios_N / _num_tokens(inputs, segment_sum).clamp_min(1)
        losses_P = _LOSSES[settings.loss](compared_N[0::2] - compared_N[1::2], settings)
        if settings.sft_weight:
            # Divided by the tokens per pair, so that a mean over pairs becomes one over tokens.
            per_pair_N = log_probs_N / _extra(inputs, "tokens_per_pair")
            losses_P = losses_P - settings.sft_weight * per_pair_N[0::2]
        num_pairs = inputs.segment_total(torch.ones_like(losses_P))
        values = self._metrics(log_probs_N.detach(), ratios_N.detach())
        metrics = {name: (inputs.segment_total(values[name]), num_pairs) for name in values}
        return Loss(inputs.segment_total(losses_P), num_pairs, metrics)

    def _metrics(
        self, log_probs_N: torch.Tensor, ratios_N: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        rewards_N = self.settings.beta * ratios_N
        chosen_P, rejected_P = rewards_N[0::2], rewards_N[1::2]
        values = (
            chosen_P,
            rejected_P,
            chosen_P - rejected_P,
            (chosen_P > rejected_P).double(),
            log_probs_N[0::2],
            log_probs_N[1::2],
            ratios_N[0::2],
        )
        return dict(zip(self.metric_names, values, strict=True))


def _log_probs(inputs: LossInputs, segment_sum: SegmentSum) -> torch.Tensor:
    """Log-probability of each answer [N]."""
    mask_BS = inputs.loss_mask_BS
    sums_N = segment_sum(inputs.log_probs_BS * mask_BS)
    if inputs.alternative_log_probs_BS is None:
        return sums_N
    return sums_N + _as_rejected(segment_sum(inputs.alternative_log_probs_BS * mask_BS))


def _num_tokens(inputs: LossInputs, segment_sum: SegmentSum) -> torch.Tensor:
    """Number of loss tokens of each answer [N]."""
    mask_BS = inputs.loss_mask_BS
    counts_N = segment_sum(mask_BS)
    if inputs.alternative_mask_BS is None:
        return counts_N
    return counts_N + _as_rejected(segment_sum(inputs.alternative_mask_BS * mask_BS))


def _as_rejected(values_N: torch.Tensor) -> torch.Tensor:
    """Values of segments 2i at 2i + 1, and 0 at 2i."""
    moved_N = torch.zeros_like(values_N)
    moved_N[1::2] = values_N[0::2]
    return moved_N


def _extra(inputs: LossInputs, name: str) -> torch.Tensor:
    """Return values per segment; a micro-batch without pairs may lack them."""
    return inputs.segment_extras.get(name, inputs.log_probs_BS.new_zeros(0, dtype=torch.float64))


def _check(inputs: LossInputs, settings: DpoConfig) -> None:
    if inputs.num_segments % 2:
        raise DataError(
            f"a micro-batch has {inputs.num_segments} segments, expected an even number; keep both "
            "answers of a pair in one row"
        )
    needed = _REMEDIES if settings.sft_weight else ("reference",)
    for name in needed:
        if inputs.num_segments and name not in inputs.segment_extras:
            raise DataError(
                f"a batch of {inputs.num_segments // 2} pairs has no segment_extras[{name!r}], "
                f"which run.stage=dpo needs; {_REMEDIES[name]}"
            )


def _has_references(recipe: Recipe) -> Iterator[str]:
    if recipe.data.reference_cache is None:
        yield (
            "run.stage=dpo needs a reference model, but data.reference_cache is not set; set it to "
            "the directory that `phi4 dpo cache-ref` wrote"
        )


def _smooths_what_can_be(recipe: Recipe) -> Iterator[str]:
    dpo = recipe.dpo
    if dpo.label_smoothing and dpo.loss != "sigmoid":
        yield (
            f"dpo.label_smoothing={dpo.label_smoothing} has no effect with dpo.loss={dpo.loss}; "
            "use dpo.loss=sigmoid, or 0"
        )


def _keeps_answers_apart(recipe: Recipe) -> Iterator[str]:
    if not recipe.data.document_mask:
        yield (
            "data.document_mask=false lets the rejected answer of a pair attend to the chosen one "
            "in its row; run.stage=dpo needs true"
        )


STAGE = Stage(
    make_objective=lambda recipe: PreferenceLoss(recipe.dpo),
    source_kinds=frozenset(("pairs", "pivots")),
    rules=(
        starts_from_weights,
        _has_references,
        _smooths_what_can_be,
        _keeps_answers_apart,
        _multiplies_as_the_reference,
    ),
    hooks=(check_reference, start_gate),
)
