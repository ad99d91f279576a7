"""Cross-entropy of logits whose vocabulary is split across tensor ranks: 6 bytes per bf16 logit.

The loss reads the logits once; the gradient overwrites them. Between the two, ranks exchange
three fp32 numbers per token (maximum, sum of exponentials, target logit; a fourth with label
smoothing) in one all-gather and combine them in rank order, so every rank holds the same bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.autograd import needs_graph, once_differentiable, without_autocast
from phi4_kernels.checks import (
    FLOAT_DTYPES,
    expect_dtype,
    expect_rows_in_place,
    expect_same_device,
    expect_shape,
)
from phi4_kernels.cross_entropy import torch_impl
from phi4_kernels.cross_entropy.options import PLAIN, LossOptions
from phi4_kernels.errors import KernelError, ShapeError, TargetError
from phi4_kernels.operators import register


class CrossEntropy(NamedTuple):
    """Per-token results, fp32, in the shape of the targets; both are differentiable."""

    losses: Tensor
    """With label smoothing, z-loss and weights; 0 where the target is ignored."""
    log_probs: Tensor
    """Log-probability of the target, without any of them; 0 where the target is ignored."""


class VocabularyShard(NamedTuple):
    """Which part of the vocabulary this rank holds."""

    group: dist.ProcessGroup | None
    size: int
    first: int
    vocabulary: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, width: int) -> "VocabularyShard":
        """The shard of `width` columns on this rank of `group`; the whole without a group."""
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        return cls(group, size, rank * width, size * width)


@without_autocast
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    options: LossOptions = PLAIN,
    *,
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
) -> CrossEntropy:
    """Loss and log-probability of every token.

    Args:
        logits: [..., V / P], this rank's columns, bf16, fp16 or fp32, contiguous within a token.
            Backward overwrites them with their gradient: nothing else may read them then.
        targets: [...], int32 or int64, ids in [0, V) or options.ignore_index. Any other id gives
            NaN, and under PHI4_KERNELS_DEBUG=1 an error.
        options: ignored id, label smoothing, z-loss.
        weights: [...], fp32, multiply the losses; they get no gradient.
        group: the P tensor ranks, each with V / P columns in rank order; None for P = 1.
        implementation: see dispatch.choose.

    Returns:
        losses and log_probs, the same bits on every rank. Without autograd logits stay as they are.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
        KernelError: logits are a leaf that requires grad, or weights require grad; in backward,
            when the logits were already overwritten by their gradient.
        TargetError: under PHI4_KERNELS_DEBUG=1, a target is out of range; ranks that differ in
            columns are a ShapeError then.

    Collectives: forward one all-gather over group, 12 bytes per token and rank (16 with label
        smoothing); backward none.
    Source: Megatron-LM (Shoeybi et al. 2019), section 3; online softmax (Milakov and Gimelshein
        2018); z-loss (PaLM, Chowdhery et al. 2022, section 5).
    """
    _check(logits, targets, weights)
    shard = VocabularyShard.of(group, logits.shape[-1])
    if dispatch.debug():
        check_values(targets, options, shard)
    name = dispatch.resolve("cross_entropy", implementation, logits.device)
    rows, ids, scales = logits.flatten(0, -2), flat(targets), flat(weights)
    common = (options, shard, name)
    if needs_graph(logits):
        losses, log_probs = _CrossEntropyFunction.apply(rows, ids, scales, common)
    else:
        losses, log_probs, _ = run_forward(rows, ids, scales, *common)
    if targets.dim() > 1:
        losses, log_probs = losses.view(targets.shape), log_probs.view(targets.shape)
    return CrossEntropy(losses, log_probs)


def _check(logits: Tensor, targets: Tensor, weights: Tensor | None) -> None:
    op = "cross_entropy"
    expect_dtype(op, "logits", logits, FLOAT_DTYPES)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ShapeError(
            f"{op}: logits have shape {tuple(logits.shape)}; expected [..., V / P] with a column "
            "or more; pass one row per token"
        )
    expect_rows_in_place(op, "logits", logits, 1)
    if logits.is_leaf and logits.requires_grad:
        raise KernelError(
            f"{op}: logits are a leaf that requires grad; expected an activation, because the "
            "gradient takes its place; pass a projection's output, or a clone"
        )
    check_tokens(op, logits, tuple(logits.shape[:-1]), targets, weights)


def check_tokens(
    op: str, like: Tensor, shape: tuple[int, ...], targets: Tensor, weights: Tensor | None
) -> None:
    """Check targets and weights of `shape`, on the device of `like`."""
    expect_dtype(op, "targets", targets, (torch.int64, torch.int32))
    expect_shape(op, "targets", targets, shape, "one id per token")
    if weights is not None:
        expect_dtype(op, "weights", weights, (torch.float32,))
        expect_shape(op, "weights", weights, shape, "one weight per token")
        if weights.requires_grad:
            raise KernelError(
                f"{op}: weights require grad; expected constants; detach them, or weigh the "
                "losses outside"
            )
    expect_same_device(op, logits=like, targets=targets, weights=weights)


def check_values(targets: Tensor, options: LossOptions, shard: VocabularyShard) -> None:
    """Check ids, and that ranks hold equal shards; reads device memory.

    Collectives: one all-gather over shard.group of 8 bytes per rank.
    """
    if shard.group is not None:
        mine = torch.tensor([shard.vocabulary], device=targets.device)
        all_ranks = mine.new_empty(shard.size)
        dist.all_gather_into_tensor(all_ranks, mine, group=shard.group)
        widths = [total // shard.size for total in all_ranks.tolist()]
        if len(set(widths)) > 1:
            raise ShapeError(
                f"cross_entropy: ranks hold {widths} columns; expected equal shards; pad the "
                f"vocabulary to a multiple of {shard.size}"
            )
    counted = targets[targets != options.ignore_index]
    low, high = (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)
    if low < 0 or high >= shard.vocabulary:
        raise TargetError(
            f"cross_entropy: targets span {low} to {high}; expected 0 to {shard.vocabulary - 1} "
            f"or {options.ignore_index}; fix the ids, or set ignore_index"
        )


def run_forward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    options: LossOptions,
    shard: VocabularyShard,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [T], log-probabilities [T] and what backward needs [T, 3], all fp32.

    Collectives: those of run_statistics.
    """
    if shard.size > 1 or name == "torch":
        # Ranks exchange 3 or 4 numbers per token, never logits.
        statistics = run_statistics(logits, targets, options, shard, name)
        return run_combine(statistics, targets, weights, options, shard, name)
    # Without ranks to exchange with, one launch does both.
    constants = (options.ignore_index, options.label_smoothing, options.z_loss)
    return _forward(logits, targets, weights, *constants, name)


def run_statistics(
    logits: Tensor, targets: Tensor, options: LossOptions, shard: VocabularyShard, name: str
) -> Tensor:
    """The all-gathered statistics of [T, V / P] logits: [P, T, 3 or 4], fp32.

    Collectives: one all-gather over shard.group; none for no tokens, which all ranks have alike.
    """
    run = torch_impl.statistics if name == "torch" else _named(_statistics, name)
    local = run(logits, targets, shard.first, options.ignore_index, options.label_smoothing > 0)
    if shard.group is None or not local.numel():
        return local.unsqueeze(0)
    gathered = local.new_empty((shard.size * local.shape[0], local.shape[1]))
    dist.all_gather_into_tensor(gathered, local, group=shard.group)
    return gathered.view(shard.size, *local.shape)


def run_combine(
    statistics: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    options: LossOptions,
    shard: VocabularyShard,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [T], log-probabilities [T] and what backward needs [T, 3], all fp32."""
    run = torch_impl.combine if name == "torch" else _named(_combine, name)
    constants = (options.ignore_index, options.label_smoothing, options.z_loss)
    return run(statistics, targets, weights, shard.vocabulary, *constants)


def run_backward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    normalizer: Tensor,
    gradients: tuple[Tensor | None, Tensor | None],
    options: LossOptions,
    shard: VocabularyShard,
    name: str,
) -> None:
    """Overwrite logits [T, V / P] with their gradient, given those of losses and log_probs."""
    run = torch_impl.backward if name == "torch" else _named(_backward, name)
    vocabulary = (shard.first, shard.vocabulary)
    constants = (options.ignore_index, options.label_smoothing)
    run(logits, targets, weights, normalizer, *gradients, *vocabulary, *constants)


def _named(operator: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda *args: operator(*args, name)


@overload
def flat(tensor: Tensor) -> Tensor: ...
@overload
def flat(tensor: None) -> None: ...
@overload
def flat(tensor: Tensor | None) -> Tensor | None: ...
def flat(tensor: Tensor | None) -> Tensor | None:
    """[...] as contiguous [T]; None stays None."""
    return None if tensor is None else tensor.flatten().contiguous()


class _CrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        common: tuple[LossOptions, VocabularyShard, str],
    ) -> tuple[Tensor, Tensor]:
        losses, log_probs, normalizer = run_forward(logits, targets, weights, *common)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, weights, normalizer)
        ctx.common = common
        return losses, log_probs

    @staticmethod
    @once_differentiable("cross_entropy")
    def backward(
        ctx: Any, dlosses: Tensor | None, dlog_probs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.common is None:
            raise KernelError(
                "cross_entropy: backward ran before; expected once, because the gradient took the "
                "logits' place; sum the losses before one backward, or run forward again"
            )
        if dlosses is None and dlog_probs is None:
            return None, None, None, None
        logits, targets, weights, normalizer = ctx.saved_tensors
        # Written into the logits: a second [T, V / P] would be the largest tensor of the step.
        gradient, incoming = logits.detach(), (flat(dlosses), flat(dlog_probs))
        run_backward(gradient, targets, weights, normalizer, incoming, *ctx.common)
        # The logits are gone.
        ctx.common = None
        return gradient, None, None, None


def _fake_results(empty: Callable[..., Tensor], num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((num_tokens,), (num_tokens,), (num_tokens, 3))
    losses, log_probs, normalizer = (empty(shape, dtype=torch.float32) for shape in shapes)
    return losses, log_probs, normalizer


_forward = register(
    "cross_entropy",
    "forward",
    "cross_entropy_forward(Tensor logits, Tensor targets, Tensor? weights, int ignore_index, "
    "float label_smoothing, float z_loss) -> (Tensor losses, Tensor log_probs, Tensor normalizer)",
    lambda logits, targets, *others: _fake_results(targets.new_empty, targets.shape[0]),
)
_statistics = register(
    "cross_entropy",
    "statistics",
    "cross_entropy_statistics(Tensor logits, Tensor targets, int first, int ignore_index, "
    "bool with_sum) -> Tensor",
    lambda logits, targets, first, ignore_index, with_sum: logits.new_empty(
        (logits.shape[0], 3 + with_sum), dtype=torch.float32
    ),
)
_combine = register(
    "cross_entropy",
    "combine",
    "cross_entropy_combine(Tensor statistics, Tensor targets, Tensor? weights, int vocabulary, "
    "int ignore_index, float label_smoothing, float z_loss) "
    "-> (Tensor losses, Tensor log_probs, Tensor normalizer)",
    lambda statistics, *others: _fake_results(statistics.new_empty, statistics.shape[1]),
)
_backward = register(
    "cross_entropy",
    "backward",
    "cross_entropy_backward(Tensor(a!) logits, Tensor targets, Tensor? weights, "
    "Tensor normalizer, Tensor? dlosses, Tensor? dlog_probs, int first, int vocabulary, "
    "int ignore_index, float label_smoothing) -> ()",
    lambda *args: None,
)
