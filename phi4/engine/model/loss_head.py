"""The loss head: the output projection, and the log-probabilities of the labels.

Objectives use log-probabilities per token, never logits. How much of the logits exists at a time is
set by the recipe (`loss_head.form`), and never changes by itself:

* `logits`: all of a micro-batch, kept for backward, where their gradient takes their place.
* `recompute`: some tokens' at a time, computed again in backward.
* `one_pass`: some tokens' at a time, and in forward their gradients too. That needs the gradient of
  the log-probabilities before there is a loss, so it serves only objectives that declare it
  (`Objective.gradient`); others are refused before the first step. One that declares it and has
  another gives an error in backward on a CPU, and NaN gradients on a GPU, which cannot stop there.

The last two add the weight's gradient to megatron-core's fp32 buffer themselves, as `logits` lets
its linear do.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from phi4_kernels.cross_entropy import (
    LinearLayout,
    cross_entropy,
    linear_cross_entropy,
    summed_linear_cross_entropy,
)

from phi4.config import LossHeadConfig
from phi4.engine.model.hook_arguments import refuse
from phi4.engine.model.weight_gradients import AddsItsOwnGradient
from phi4.errors import ConfigError

# Shape legend: S positions, B rows, V vocabulary, H hidden, tp tensor ranks.

_LABELLED = {"runtime_gather_output": None}


class LossHead(ColumnParallelLinear):
    """megatron-core's output layer, which converts labels to their log-probabilities."""

    settings = LossHeadConfig()
    implementation = "torch"
    """Implementation of cross_entropy; see phi4_kernels.dispatch."""

    @classmethod
    def take_over(
        cls, layer: ColumnParallelLinear, settings: LossHeadConfig, implementation: str
    ) -> None:
        """Convert a plain layer to this class, because GPTModel does not let a spec choose it."""
        layer.__class__ = cls
        layer.settings, layer.implementation = settings, implementation

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Run as megatron-core's layer; with labels return their log-probabilities instead of
        logits.

        Args:
            input_: [S, B, H] (S / tp under SP).
            weight: weight of the embedding if it is tied to the output.
            runtime_gather_output: see megatron-core; None with labels.
            labels: [B, S], int64, global token ids in [0, V).
            loss_mask: [B, S], fp32; required by one_pass if there is a gradient.

        Returns:
            [B, S], fp32, the same on every tensor rank; and no bias.

        Raises:
            ConfigError: runtime_gather_output with labels; in backward with one_pass on a CPU, when
                the objective's gradient is not what it declares.

        Collectives: of the parallel linear and one all-gather over tp, 12 bytes per token and rank;
            see phi4_kernels.cross_entropy.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        refuse("loss head", {"runtime_gather_output": runtime_gather_output}, _LABELLED)
        labels_SB = labels.t().contiguous()
        if self.settings.form == "logits":
            logits_SBV, _ = super().forward(input_, weight)
            out = cross_entropy(
                logits_SBV, labels_SB, group=self._group, implementation=self.implementation
            )
            return out.log_probs.t(), None
        return self._in_chunks(input_, weight, labels_SB, loss_mask).t(), None

    def _in_chunks(
        self,
        hidden_SBH: torch.Tensor,
        tied_weight: torch.Tensor | None,
        labels_SB: torch.Tensor,
        loss_mask_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return log-probabilities [S, B]."""
        main_grad, weight = None, tied_weight
        if weight is None:
            # A tied weight gets another gradient, from the embedding, which autograd must add.
            main_grad, weight = getattr(self.weight, "main_grad", None), self.weight
        if main_grad is not None and torch.is_grad_enabled():
            weight = AddsItsOwnGradient.apply(weight)
        layout = LinearLayout(self._group, self.sequence_parallel, self.settings.chunk_tokens)
        if self.settings.form == "recompute" or not torch.is_grad_enabled():
            return linear_cross_entropy(
                hidden_SBH,
                weight,
                labels_SB,
                layout=layout,
                main_grad=main_grad,
                implementation=self.implementation,
            ).log_probs
        assert loss_mask_BS is not None, "a step with gradients has a loss mask"
        mask_SB = loss_mask_BS.t().contiguous()
        out = summed_linear_cross_entropy(
            hidden_SBH,
            weight,
            labels_SB,
            weights=mask_SB,
            layout=layout,
            main_grad=main_grad,
            implementation=self.implementation,
        )
        return _MaskedSum.apply(out.total, out.log_probs, mask_SB)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.tp_group if self.tp_group.size() > 1 else None


class _MaskedSum(torch.autograd.Function):
    """Log-probabilities that represent the total of masked losses in autograd's graph."""

    @staticmethod
    def forward(
        ctx, total: torch.Tensor, log_probs_SB: torch.Tensor, mask_SB: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(mask_SB)
        return log_probs_SB.view_as(log_probs_SB)

    @staticmethod
    def backward(ctx, grad_SB: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (mask_SB,) = ctx.saved_tensors
        is_mask = (grad_SB == -mask_SB).all()
        if grad_SB.is_cpu and not is_mask:
            raise ConfigError(
                "loss_head.form=one_pass requires a loss sum of minus the masked "
                "log-probabilities, but the objective has another; use recompute or logits"
            )
        return torch.where(is_mask, 1.0, torch.nan).to(grad_SB.dtype), None, None
