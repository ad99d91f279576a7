"""Build the optimizer: megatron-core's (master weights, ZeRO-1) around our AdamW; see adamw."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from phi4_kernels.dispatch import Choice

from phi4.config import Recipe
from phi4.engine.layout import Layout
from phi4.engine.model.gpt import Phi4Model, global_parameters
from phi4.engine.model.implementations import implementation_of
from phi4.engine.optimizer.adamw import OnePassChain
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
    return wrapped


def gather_parameters(wrapped: list[torch.nn.Module]) -> None:
    """Wait until every rank has all updated parameters.

    With overlap_param_gather they are gathered while the next forward pass runs; code that reads
    them before that must call this.

    Collectives: all-gather of the parameters over data and context ranks where it is outstanding.
    """
    for chunk in wrapped:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


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
