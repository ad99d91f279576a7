"""Gather updated weights of FP8 linears in FP8: one byte per number instead of two.

Under the distributed optimizer a data rank updates its shard of a bucket and gathers the others'.
An FP8 linear with one scale per matrix reads nothing of its weight but the cast, so the cast is
sent. Ranks agree on the scales first. Each unpacks all shards, its own too, to bf16, which
represents the values exactly; a linear's own cast of them gives the same values again. Losses,
gradients and masters are therefore bit for bit those of a gather in bf16.

Code that reads weights in bf16 first calls `build.gather_parameters`, which rounds the masters to
bf16 again.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from phi4.engine.model.fp8.linear_products import FP8Products
from phi4.engine.model.fp8.recipe import VALUE_DTYPE
from phi4.engine.model.fp8.scales import saturated, scale_of

_ALIGNMENT_BYTES = 16
"""Size of a message is a multiple of this, so that each begins at an aligned address."""


class Field(NamedTuple):
    """A part of a message.

    Attributes:
        numbers: numbers of the bucket.
        at: bytes of the message.
        weight: index of the weight, if they are sent in FP8; None if in their dtype.
    """

    numbers: slice
    at: slice
    weight: int | None


def message(weights: Sequence[slice], shard: slice, element_bytes: int) -> list[Field]:
    """Return the parts of a rank's message: numbers in their dtype, then those in FP8.

    Args:
        weights: numbers of the bucket that are sent in FP8, one slice per weight, ascending.
        shard: numbers of the bucket that the rank updates.
        element_bytes: bytes of a number in its dtype.
    """
    in_fp8: list[tuple[slice, int | None, int]] = []
    others: list[tuple[slice, int | None, int]] = []
    done = shard.start
    for index, weight in enumerate(weights):
        start, stop = max(weight.start, shard.start), min(weight.stop, shard.stop)
        if start < stop:
            in_fp8.append((slice(start, stop), index, 1))
            others.append((slice(done, start), None, element_bytes))
            done = stop
    others.append((slice(done, shard.stop), None, element_bytes))
    fields, offset = [], 0
    for numbers, weight_index, number_bytes in (*others, *in_fp8):
        end = offset + (numbers.stop - numbers.start) * number_bytes
        if end > offset:
            fields.append(Field(numbers, slice(offset, end), weight_index))
        offset = end
    return fields


class Sent(NamedTuple):
    """The gather of a bucket in progress.

    Attributes:
        bucket: the bucket.
        rows: [ranks, bytes] of messages, complete after `work`.
        inverse: [weights], fp32; of the scales.
        work: the all-gather; None if it is done.
    """

    bucket: "FP8Bucket"
    rows: torch.Tensor
    inverse: torch.Tensor
    work: dist.Work | None


class Gathering:
    """The gathers of a group's buckets in progress; megatron-core's handle.

    Args:
        sent: one per bucket.
    """

    def __init__(self, sent: Sequence[Sent]) -> None:
        self._sent = sent

    def wait(self) -> None:
        """Wait for all messages and unpack them."""
        self.abandon()
        for one in self._sent:
            one.bucket.unpack(one.rows, one.inverse)

    def abandon(self) -> None:
        """Wait for all messages and leave the buckets as they are."""
        for one in self._sent:
            if one.work is not None:
                one.work.wait()


class FP8Bucket:
    """A bucket, some of whose weights are sent in FP8.

    Args:
        data: [numbers], bf16; one shard per rank of `group`.
        weights: these weights, views of `data`.
        group: data and context ranks.
        tp_group: ranks that hold other parts of the same weights.

    Attributes:
        messages: of every rank of `group`.
        message_bytes: sent by each rank: the size of the longest message.
    """

    def __init__(
        self,
        data: torch.Tensor,
        weights: Sequence[torch.Tensor],
        group: dist.ProcessGroup,
        tp_group: dist.ProcessGroup,
    ) -> None:
        self._data, self._num_weights = data, len(weights)
        self._group = group
        self._sharing = [one for one in (group, tp_group) if one.size() > 1]
        """Groups whose ranks hold other parts of the weights."""
        places = sorted(
            (one.storage_offset() - data.storage_offset(), one.numel()) for one in weights
        )
        spans = [slice(start, start + size) for start, size in places]
        size = data.numel() // group.size()
        self.messages = [
            message(spans, slice(rank * size, (rank + 1) * size), data.element_size())
            for rank in range(group.size())
        ]
        longest = max(fields[-1].at.stop for fields in self.messages)
        self.message_bytes = math.ceil(longest / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    @torch.no_grad()
    def start(self, *, is_async: bool) -> Sent:
        """Send this rank's shard.

        Collectives: an all-reduce (max) of 4 bytes per weight over each group; an all-gather of
            `message_bytes` over data and context ranks.
        """
        scale = self._agreed_scale()
        row = self._data.new_empty(self.message_bytes, dtype=torch.uint8)
        for numbers, at, weight in self._own_message:
            values = self._data[numbers]
            if weight is not None:
                values = saturated(values.float() * scale[weight], VALUE_DTYPE)
            row[at].view(values.dtype).copy_(values)
        rows = row.new_empty(self._group.size() * self.message_bytes)
        work = dist.all_gather_into_tensor(rows, row, group=self._group, async_op=is_async)
        # The reciprocal of a power of two is exact.
        return Sent(self, rows.view(-1, self.message_bytes), 1 / scale, work)

    @torch.no_grad()
    def unpack(self, rows: torch.Tensor, inverse: torch.Tensor) -> None:
        """Write the numbers of all messages to the bucket.

        Args:
            rows: [ranks, bytes].
            inverse: [weights], fp32; of the scales.
        """
        for row, fields in zip(rows, self.messages, strict=True):
            for numbers, at, weight in fields:
                if weight is None:
                    self._data[numbers] = row[at].view(self._data.dtype)
                else:
                    self._data[numbers] = row[at].view(VALUE_DTYPE).float() * inverse[weight]

    @property
    def _own_message(self) -> list[Field]:
        return self.messages[self._group.rank()]

    def _agreed_scale(self) -> torch.Tensor:
        """Return [weights], fp32: the scales of the linears' own casts."""
        amax = self._data.new_zeros(self._num_weights, dtype=torch.float32)
        for numbers, _, weight in self._own_message:
            if weight is not None:
                amax[weight] = self._data[numbers].abs().amax()
        for group in self._sharing:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
        return scale_of(amax, VALUE_DTYPE)


class FP8BucketGroup(_ParamAndGradBucketGroup):
    """megatron-core's group of buckets; gathers weights of FP8 linears in FP8 if told to.

    Attributes:
        is_rounded: whether its weights were gathered in FP8 since they were last exact.
        stays_exact: whether they are gathered in their dtype nevertheless.
    """

    is_rounded = False
    stays_exact = False
    param_gather_dispatched: bool
    """megatron-core's: whether the weights of the last update are being gathered, or were."""
    param_gather_handle: Any
    """megatron-core's: a `Gathering` if FP8 is being gathered."""
    _is_told = False
    _linears: Sequence[FP8Products] = ()
    _laid_out_for: Sequence[bool] | None = None
    _laid_out: Sequence[FP8Bucket] = ()
    _tp_group: dist.ProcessGroup

    def send_in_fp8(self, linears: Iterable[FP8Products], tp_group: dist.ProcessGroup) -> None:
        """Gather the weights of these linears in FP8 from now on, as far as this group has them.

        Args:
            linears: of the model chunk; those that `is_plain` are gathered in their dtype.
            tp_group: ranks that hold other parts of the same weights.
        """
        self._linears = [one for one in linears if one.weight in self.params]
        self._tp_group, self._is_told = tp_group, True

    def start_param_sync(self, force_sync: bool = False) -> None:
        """Gather the updated weights; in their dtype with `force_sync`, for which the shards are
        exact.

        Collectives: those of `FP8Bucket.start` per bucket, or one all-gather of it.
        """
        if force_sync and self._is_told:
            if isinstance(self.param_gather_handle, Gathering):
                # It would overwrite exact shards.
                self.param_gather_handle.abandon()
                self.param_gather_handle = None
            if self._is_exact:
                return
        buckets = () if force_sync or self.stays_exact else self.fp8_buckets()
        if not buckets:
            super().start_param_sync(force_sync)
            self.is_rounded = False
            return
        assert self.param_gather_handle is None, "megatron-core waits before it starts another"
        is_async = self.ddp_config.overlap_param_gather
        gathering = Gathering([bucket.start(is_async=is_async) for bucket in buckets])
        if is_async:
            self.param_gather_handle = gathering
        else:
            gathering.wait()
        self.param_gather_dispatched = self.is_rounded = True

    @property
    def _is_exact(self) -> bool:
        """Whether all ranks have the last update's weights in their dtype."""
        is_done = self.param_gather_dispatched and self.param_gather_handle is None
        return is_done and not self.is_rounded

    def fp8_buckets(self) -> Sequence[FP8Bucket]:
        """Return the buckets if any of their weights is sent in FP8, else none."""
        are_in_fp8 = [not one.is_plain for one in self._linears]
        if self._laid_out_for != are_in_fp8:
            self._laid_out_for, self._laid_out = are_in_fp8, self._laid_out_now()
        return self._laid_out

    def _laid_out_now(self) -> list[FP8Bucket]:
        weights = {one.weight for one in self._linears if not one.is_plain}
        group = self.intra_distributed_optimizer_instance_group
        if not weights or group.size() == 1:
            return []
        return [
            FP8Bucket(bucket.param_data, [*bucket.params & weights], group, self._tp_group)
            for bucket in self.buckets
        ]
