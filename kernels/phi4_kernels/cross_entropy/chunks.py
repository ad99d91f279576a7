"""The computation on one chunk of tokens: product, loss, gradients, and collectives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from phi4_kernels.cross_entropy.fp32_products import add_wide_product, wide_product
from phi4_kernels.cross_entropy.op import VocabularyShard, run_backward, run_forward
from phi4_kernels.cross_entropy.options import LossOptions
from phi4_kernels.errors import KernelError


@dataclass(frozen=True, slots=True)
class LinearLayout:
    """How the product is split over ranks and over chunks of tokens.

    Raises:
        KernelError: chunk_tokens is not positive, or sequence_parallel is set without a group.
    """

    group: dist.ProcessGroup | None = None
    """The P tensor ranks, each with V / P rows of the weight in rank order; None for P = 1."""
    sequence_parallel: bool = False
    """Each rank holds T / P tokens of the hidden states, in rank order, instead of all T."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at a time. Results are bitwise equal only for equal chunks."""

    def __post_init__(self) -> None:
        """Check both."""
        if self.chunk_tokens < 1:
            raise KernelError(
                f"LinearLayout: chunk_tokens is {self.chunk_tokens}; expected 1 or more; pass the "
                "number of tokens whose logits fit"
            )
        if self.sequence_parallel and self.group is None:
            raise KernelError(
                "LinearLayout: sequence_parallel without a group; expected the ranks that share "
                "the tokens; pass group"
            )


class Head(NamedTuple):
    """State that all chunks of a call share."""

    weight: Tensor
    options: LossOptions
    shard: VocabularyShard
    layout: LinearLayout
    name: str

    @property
    def num_parts(self) -> int:
        """Ranks that the tokens of hidden are split over."""
        return self.shard.size if self.layout.sequence_parallel else 1

    def spans(self, num_rows: int) -> Iterator[slice]:
        """Rows of this rank's hidden states, chunk by chunk."""
        step = max(1, self.layout.chunk_tokens // self.num_parts)
        return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))

    def gathered(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The chunks' spans and hidden states: this rank's rows, or those of all ranks one after
        the other. Each gather overlaps the computation on the previous chunk."""
        # One chunk ahead: its all-gather overlaps the products of the previous chunk.
        before: tuple[slice, Callable[[], Tensor]] | None = None
        for span in self.spans(rows.shape[0]):
            started = self._gather(rows[span])
            if before is not None:
                yield before[0], before[1]()
            before = (span, started)
        if before is not None:
            yield before[0], before[1]()

    def _gather(self, rows: Tensor) -> Callable[[], Tensor]:
        if self.num_parts == 1:
            return lambda: rows
        whole = rows.new_empty((self.num_parts * rows.shape[0], rows.shape[1]))
        group, own = self.shard.group, rows.contiguous()
        work = dist.all_gather_into_tensor(whole, own, group=group, async_op=True)
        return partial(_waited, work, whole, own)

    @overload
    def of_chunk(self, per_token: Tensor, span: slice) -> Tensor: ...
    @overload
    def of_chunk(self, per_token: None, span: slice) -> None: ...
    @overload
    def of_chunk(self, per_token: Tensor | None, span: slice) -> Tensor | None: ...
    def of_chunk(self, per_token: Tensor | None, span: slice) -> Tensor | None:
        """The chunk's part of a flat per-token tensor, in the order of `gathered`."""
        if per_token is None:
            return None
        # [T] is P parts of T / P tokens; a chunk is the same rows of each part, one after the
        # other.
        return per_token.unflatten(0, (self.num_parts, -1))[:, span].flatten(0, 1)

    def hidden_gradient(self, dlogits: Tensor) -> Callable[[], Tensor]:
        """Begin [rows, H] for this rank's rows, summed over the ranks in fp32; the call has it."""
        group = self.shard.group
        if group is None or self.shard.size == 1:
            is_wide = dlogits.dtype == torch.float32
            alone = wide_product(dlogits, self.weight) if is_wide else dlogits @ self.weight
            return lambda: alone
        # dhidden = dlogits weight, where dlogits are this rank's columns: a sum over ranks, in fp32
        # because bf16 shares would be rounded before they are added.
        share = wide_product(dlogits, self.weight)
        if self.num_parts == 1:
            return partial(_waited, dist.all_reduce(share, group=group, async_op=True), share)
        mine = share.new_empty((share.shape[0] // self.num_parts, share.shape[1]))
        work = dist.reduce_scatter_tensor(mine, share, group=group, async_op=True)
        return partial(_waited, work, mine, share)


def _waited(work: Any, result: Tensor, source: Tensor | None = None) -> Tensor:
    """The result of a collective on `source`; on a GPU the stream waits, not the host."""
    work.wait()
    # `source` must stay alive until here.
    del source
    return result


class Tokens(NamedTuple):
    """Flat per-token tensors of a call: targets, weights."""

    ids: Tensor
    scales: Tensor | None


class Gradients:
    """Gradients of hidden states and weight while the chunks add to them; None if not wanted."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, wanted: tuple[bool, bool], main_grad: Tensor | None
    ) -> None:
        self.hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        self.weight = main_grad if wanted[1] else None
        if wanted[1] and main_grad is None:
            self.weight = weight.new_zeros(weight.shape, dtype=torch.float32)

    def add(self, head: Head, span: slice, rows: Tensor, dlogits: Tensor) -> None:
        """Add a chunk; the ranks sum the one gradient while the other is computed."""
        # dweight += dlogits^T hidden
        of_hidden = None if self.hidden is None else head.hidden_gradient(dlogits)
        if self.weight is not None:
            add_wide_product(self.weight, dlogits, rows)
        if self.hidden is not None and of_hidden is not None:
            self.hidden[span] = of_hidden()


def _forward_chunk(
    head: Head, whole: Tensor, tokens: Tokens, span: slice, gradients: Gradients | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-probabilities and normalizer of a chunk; its logits are freed on return."""
    # logits = hidden weight^T of chunk_tokens tokens; no other logits exist at the time
    logits = whole @ head.weight.t()
    ids, scales = head.of_chunk(tokens.ids, span), head.of_chunk(tokens.scales, span)
    common = (head.options, head.shard, head.name)
    results = run_forward(logits, ids, scales, *common)
    if gradients is not None:
        # The total is a plain sum, so each loss has a gradient of 1, known before backward.
        incoming = (torch.ones_like(results[0]), None)
        run_backward(logits, ids, scales, results[2], incoming, *common)
        gradients.add(head, span, whole, logits)
    return results


def forward(
    head: Head, rows: Tensor, tokens: Tokens, gradients: Gradients | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [T], log-probabilities [T] and normalizer [T, 3] of all tokens."""
    fp32 = partial(torch.empty, dtype=torch.float32, device=rows.device)
    num_tokens = tokens.ids.shape[0]
    outputs = (fp32((num_tokens,)), fp32((num_tokens,)), fp32((num_tokens, 3)))
    split = (head.num_parts, -1)
    for span, whole in head.gathered(rows):
        parts = _forward_chunk(head, whole, tokens, span, gradients)
        for output, part in zip(outputs, parts, strict=True):
            output.unflatten(0, split)[:, span] = part.unflatten(0, split)
    return outputs


def backward(
    head: Head,
    rows: Tensor,
    tokens: Tokens,
    saved: tuple[Tensor, Tensor | None, Tensor | None],
    gradients: Gradients,
) -> None:
    """Add the gradients of all tokens; `saved` holds normalizer, dlosses, dlog_probs."""
    for span, whole in head.gathered(rows):
        _backward_chunk(head, whole, tokens, span, saved, gradients)


def _backward_chunk(
    head: Head,
    whole: Tensor,
    tokens: Tokens,
    span: slice,
    saved: tuple[Tensor, Tensor | None, Tensor | None],
    gradients: Gradients,
) -> None:
    """Add a chunk's gradients; `saved` holds normalizer, dlosses, dlog_probs of all tokens."""
    # Computed again, as they were overwritten or never kept: 2 T H V operations save T V elements.
    logits = whole @ head.weight.t()
    ids, scales = head.of_chunk(tokens.ids, span), head.of_chunk(tokens.scales, span)
    normalizer = head.of_chunk(saved[0], span)
    incoming = head.of_chunk(saved[1], span), head.of_chunk(saved[2], span)
    run_backward(logits, ids, scales, normalizer, incoming, head.options, head.shard, head.name)
    gradients.add(head, span, whole, logits)
