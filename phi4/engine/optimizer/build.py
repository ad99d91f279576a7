"""Build the optimizer: megatron-core's (master weights, ZeRO-1) around our AdamW; see adamw."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from phi4_kernels.dispatch import Choice

from phi4.config import Recipe
from phi4.engine.layout import Layout
from phi4.engine.model.fp8.layers import fp8_linears
from phi4.engine.model.gpt import Phi4Model, global_parameters
from phi4.engine.model.implementations import implementation_of
from phi4.engine.optimizer.adamw import OnePassChain
from phi4.engine.optimizer.fp8_gather import FP8BucketGroup
from phi4.engine.precision import torch_dtype
from phi4.model.names import parameter_group
from phi4.model.shape import PARAMETER_GROUPS


def wrap_data_parallel(
    chunks: list[Phi4Model], config: TransformerConfig, recipe: Recipe, layout: Layout
) -> list[DistributedDataParallel]:
    """Wrap chunks with fp32 gradient buffers and their reduction over data and context ranks.

    With overlap_grad_reduce the schedule reduces after the last micro-batch only.
    """
    parallel = recipe.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(
            config, ddp, chunk, disable_bucketing=index > 0, pg_collection=layout.groups
        )
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    if parallel.fp8_param_gather:
        for chunk in wrapped:
            for group in chunk.bucket_groups:
                group.send_in_fp8(fp8_linears([chunk]), layout.groups.tp)
    return wrapped


def gather_parameters(wrapped: Sequence[torch.nn.Module], optimizer: OnePassChain | None) -> None:
    """Wait until every rank has all updated parameters, in their dtype.

    With overlap_param_gather they are gathered while the next forward pass runs, and with
    fp8_param_gather weights are rounded to FP8; code that reads them must call this before.

    Args:
        wrapped: this rank's model chunks.
        optimizer: over the same parameters; None if there is none.

    Collectives: all-gather of the parameters over data and context ranks where it is outstanding
        or rounded them.
    """
    chunks = [chunk for chunk in wrapped if isinstance(chunk, DistributedDataParallel)]
    are_rounded = any(group.is_rounded for group in _fp8_groups(chunks))
    if are_rounded:
        assert optimizer is not None, "gradient buffers come with an optimizer"
        optimizer.rewrite_weights()
    for chunk in chunks:
        if are_rounded or chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


@contextmanager
def exact_parameters(wrapped: Sequence[torch.nn.Module], optimizer: OnePassChain) -> Iterator[None]:
    """Keep all parameters in their dtype in the block, whatever passes run in it.

    Collectives: those of `gather_parameters`.
    """
    gather_parameters(wrapped, optimizer)
    groups = _fp8_groups(wrapped)
    try:
        for group in groups:
            group.stays_exact = True
        yield
    finally:
        for group in groups:
            group.stays_exact = False


def _fp8_groups(wrapped: Sequence[torch.nn.Module]) -> list[FP8BucketGroup]:
    """Return the groups of buckets that may be gathered in FP8."""
    return [
        group
        for chunk in wrapped
        if isinstance(chunk, DistributedDataParallel)
        for group in chunk.bucket_groups
        if isinstance(group, FP8BucketGroup)
    ]


def build_optimizer(
    wrapped: list[DistributedDataParallel], recipe: Recipe, choices: Sequence[Choice] = ()
) -> OnePassChain:
    """Build AdamW over this rank's parameters, with weight decay on matrices only.

    Args:
        wrapped: this rank's model chunks with their gradient buffers.
        recipe: the run's recipe.
        choices: from `spec.choose`: implementations of `adamw` and `grad_norm`.

    Collectives: one all-gather of group names over all ranks.
    """
    optim = recipe.optim
    dtype = torch_dtype(recipe.precision)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.learning_rate,
            min_lr=optim.min_learning_rate,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=recipe.parallel.distributed_optimizer,
            overlap_param_gather=recipe.parallel.overlap_param_gather,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in PARAMETER_GROUPS}
    for name, parameter in global_parameters([chunk.module for chunk in wrapped]):
        groups[parameter_group(name)].append(parameter)
    optimizer.serve_by(
        adamw=implementation_of("adamw", choices),
        grad_norm=implementation_of("grad_norm", choices),
        groups=groups,
    )
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Set every group's learning rate and decay; norm weights carry wd_mult = 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
