"""megatron-core's optimizers with our AdamW: after the norm, one pass over the gradient.

Stock, a step reads and writes the gradients to divide them by the number of tokens, reads them for
their norm, reads and writes them to clip, reads them to update, and then reads the masters to write
the bf16 weights. Here both factors stay on the device and the update uses their product, with
masters, moments and bf16 weights written from registers: the gradient is read twice, once for the
norm, and never written (torch's own AdamW writes it back, scaled). Preparing needs no change:
gradient buffers are fp32, so megatron-core's `main_param.grad = main_grad.float()` is a view.

A gradient norm that is not finite or above the step's limit, or a loss that the step does not
accept, changes nothing: no parameter, no moment, no step count.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
)
from phi4_kernels.adamw import FusedAdam
from phi4_kernels.grad_norm import clip_factor, square_sum
from torch import Tensor

CLIP_EPS = 1e-6
"""Added to the norm in divisions, as in torch.nn.utils.clip_grad_norm_ and megatron-core."""


def norm_within(square_sum: Tensor, limit: float) -> Tensor:
    """Return [] bool on the device: the root is finite and at most this; False for NaN."""
    # The root, as reported by a step: the square of a root may be less than the original number.
    return square_sum.sqrt() <= min(limit, sys.float_info.max)


class OnePass:
    """Replaces clipping, step and copies in each of megatron-core's optimizers."""

    get_parameters: Callable[[], list[Tensor]]
    is_stub_optimizer: bool
    optimizer: FusedAdam

    @cached_property
    def weights(self) -> dict[Tensor, Tensor]:
        """By fp32 master: the corresponding bf16 weight, or this rank's part of it."""
        return {}

    @property
    def owners(self) -> dict[Tensor, Tensor]:
        """By the tensor that this optimizer updates: the model's parameter that it is, or is part
        of."""
        return {parameter: parameter for parameter in self.get_parameters()}

    def update(self, grad_scale: Tensor, found_inf: Tensor) -> None:
        """Enqueue the update with prepared gradients; see FusedAdam.update."""
        if not self.is_stub_optimizer:
            self.optimizer.update(grad_scale=grad_scale, found_inf=found_inf, weights=self.weights)

    def rewrite_weights(self) -> None:
        """Round the masters to the corresponding weights again, as the last update did."""
        if not self.is_stub_optimizer:
            for master, weight in self.weights.items():
                weight.copy_(master)


class OnePassFP32(OnePass, FP32Optimizer):
    """fp32 weights, complete on every data rank, without separate masters."""


class OnePassFloat16(OnePass, Float16OptimizerWithFloat16Params):
    """bf16 weights with fp32 masters, complete on every data rank."""

    @cached_property
    def weights(self) -> dict[Tensor, Tensor]:
        """See OnePass."""
        return {main: model.data for main, model in self.owners.items()}

    @property
    def owners(self) -> dict[Tensor, Tensor]:
        """See OnePass."""
        return _pairs(self.fp32_from_float16_groups, self.float16_groups)


class OnePassDistributed(OnePass, DistributedOptimizer):
    """ZeRO-1: this data rank's parts of the buckets, in fp32 or bf16 with fp32 masters.

    fp32 masters are views of the parameter buffer, which the update writes in place.
    """

    @cached_property
    def weights(self) -> dict[Tensor, Tensor]:
        """See OnePass; parts of the parameter buffer that the next all-gather sends."""
        masters = _pairs(self.shard_fp32_from_float16_groups, self.model_float16_groups)
        return {main: self._part_of_buffer(model) for main, model in masters.items()}

    @property
    def owners(self) -> dict[Tensor, Tensor]:
        """See OnePass; of parts of parameters."""
        if self.is_stub_optimizer:
            return {}
        return _pairs(self.shard_fp32_from_float16_groups, self.model_float16_groups) | _pairs(
            self.shard_fp32_groups, self.model_fp32_groups
        )

    def update(self, grad_scale: Tensor, found_inf: Tensor) -> None:
        """See OnePass.

        Collectives: all-gather of the parameters over data and context ranks, unless it overlaps
        the next forward pass.
        """
        super().update(grad_scale, found_inf)
        if not self.ddp_config.overlap_param_gather:
            for chunk in self.model_chunks:
                chunk.start_param_sync()

    def _part_of_buffer(self, model: Tensor) -> Tensor:
        buffer_index, _, bucket_index = self.model_param_gbuf_map[model]
        part = self._get_model_param_range_map(model)["gbuf_world_in_bucket"]
        bucket = self.buffers[buffer_index].buckets[bucket_index]
        return bucket.param_data.view(-1)[part.start : part.end]


def _pairs(
    keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]
) -> dict[Tensor, Tensor]:
    """Pair the lists of megatron-core's parameter groups one to one."""
    return {
        key: value
        for some_keys, some_values in zip(keys, values, strict=True)
        for key, value in zip(some_keys, some_values, strict=True)
    }


class OnePassChain(ChainedOptimizer):
    """The optimizer of a rank: norm, clip factor and update, in that order."""

    def serve_by(
        self, *, adamw: str, grad_norm: str, groups: Mapping[str, Sequence[Tensor]]
    ) -> None:
        """Set the implementations of the two ops, and the parameters of each group.

        Args:
            adamw, grad_norm: implementations.
            groups: the model's parameters on this rank by group name for norms; the same names on
                every rank, and every parameter once.
        """
        self._grad_norm = grad_norm
        self._groups = tuple(groups)
        self._group_of = {one: name for name, members in groups.items() for one in members}
        for optimizer in self.chained_optimizers:
            if not optimizer.is_stub_optimizer:
                optimizer.optimizer.implementation = adamw

    @torch.no_grad()
    def step(
        self,
        gradient_scale: Tensor,
        accepted: Tensor,
        norm_limit: float = math.inf,
        by_group: bool = False,
    ) -> tuple[bool, float, None]:
        """Return (whether parameters changed, norm of the scaled gradients before clipping, None).

        Args:
            gradient_scale: [] fp64 on the device: factor applied to the gradients first.
            accepted: [] bool on the device: if False, nothing changes.
            norm_limit: nothing changes either if the norm exceeds this.
            by_group: whether to compute `group_norms` too.

        Collectives: all-reduce of one number over the ranks that hold different gradients, with
        `by_group` another of one number per group; those of the optimizers' `update`.
        """
        self.prepare_grads()
        total = self.square_sum() * gradient_scale.square()
        if by_group:
            # Before the update: torch's own AdamW overwrites the gradient.
            self._group_totals = self._group_square_sums() * gradient_scale.square()
        factor, max_norm = gradient_scale, self.config.clip_grad
        if max_norm > 0:
            factor = factor * clip_factor(total, max_norm, CLIP_EPS)
        good = norm_within(total, norm_limit) & accepted
        found_inf = (~good).float()
        for optimizer in self.chained_optimizers:
            optimizer.update(factor.float(), found_inf)
        # Read only now: everything above is enqueued.
        total_value, good_value = torch.stack([total, good.to(total.dtype)]).tolist()
        if not good_value:
            self._retract()
        return bool(good_value), math.sqrt(total_value), None

    local_square_sum: Tensor
    """[] of the gradients that this rank counted in the last step, before scaling."""

    @torch.no_grad()
    def square_sum(self) -> Tensor:
        """Return [] over all gradients of the model, prepared and not scaled; their norm is its
        root.

        Collectives: as `step`.
        """
        gradients = [
            gradient
            for optimizer in self.chained_optimizers
            for gradient in optimizer.get_main_grads_for_grad_norm()
        ]
        total = self._local_sum(gradients)
        self.local_square_sum = total.clone()
        dist.all_reduce(total, group=self.get_grad_stats_parallel_group())
        return total

    @torch.no_grad()
    def rewrite_weights(self) -> None:
        """Round this rank's masters to its part of the weights again."""
        for optimizer in self.chained_optimizers:
            optimizer.rewrite_weights()

    def counted_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return (parameter of the model, its prepared gradient or this rank's part of it) for all
        that this rank counts in the norm.
        """
        for optimizer in self.chained_optimizers:
            # megatron-core defines which gradients count: copies on other ranks do not.
            of_gradient = {one.grad: model for one, model in optimizer.owners.items()}
            for gradient in optimizer.get_main_grads_for_grad_norm():
                yield of_gradient[gradient], gradient

    def group_norms(self) -> dict[str, float]:
        """Return norms of the scaled gradients of each group in the last step with `by_group`.

        Synchronises with the device.
        """
        return dict(zip(self._groups, self._group_totals.sqrt().tolist(), strict=True))

    def _group_square_sums(self) -> Tensor:
        """Return [groups] as `square_sum`, which is their total."""
        gradients: dict[str, list[Tensor]] = {name: [] for name in self._groups}
        for parameter, gradient in self.counted_gradients():
            gradients[self._group_of[parameter]].append(gradient)
        totals = torch.stack([self._local_sum(members) for members in gradients.values()])
        dist.all_reduce(totals, group=self.get_grad_stats_parallel_group())
        return totals

    def _local_sum(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return [] fp64 over gradients of this rank, of which there may be none."""
        if gradients:
            return square_sum(gradients, implementation=self._grad_norm)
        return torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())

    def _retract(self) -> None:
        for optimizer in self.chained_optimizers:
            if not optimizer.is_stub_optimizer:
                optimizer.optimizer.retract()
