"""AdamW by torch's own fused update, used where the CUDA op does not run.

It also reads each gradient once, but writes the scaled gradient back where a scale is given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from phi4_kernels.adamw.arguments import Hyper, ParameterShard
from phi4_kernels.fp8_cast import reference as fp8_reference


def adamw(
    shards: Sequence[ParameterShard],
    step: int | Tensor,
    hyper: Hyper,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See op.adamw, whose checks have passed."""
    if not isinstance(step, Tensor):
        # Filled on the device: a copy from the host could not be captured.
        step = torch.full((), float(step), device=shards[0].param.device)
    at = step.float()
    torch._fused_adamw_(
        [shard.param for shard in shards],
        [shard.grad.float() for shard in shards],
        [shard.exp_avg for shard in shards],
        [shard.exp_avg_sq for shard in shards],
        [],
        [at] * len(shards),
        lr=hyper.lr.float() if isinstance(hyper.lr, Tensor) else hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
        # torch divides by its scale, and treats found_inf = 1 as an overflow.
        grad_scale=None if grad_scale is None else grad_scale.reciprocal(),
        found_inf=None if found_inf is None else (found_inf != 0).float(),
    )
    # Unlike other operators of torch, the fused update does not increment version counters.
    torch.autograd.graph.increment_version([shard.param for shard in shards])
    weighted = [(shard.weight, shard.param) for shard in shards if shard.weight is not None]
    if weighted:
        torch._foreach_copy_([weight for weight, _ in weighted], [param for _, param in weighted])
    for shard in shards:
        if shard.fp8 is not None:
            matrix = shard.param.unsqueeze(0)
            data, amax = fp8_reference.cast_tensor(matrix, shard.fp8.scale, shard.fp8.data.dtype)
            shard.fp8.data.copy_(data[0])
            shard.fp8.amax.copy_(torch.maximum(shard.fp8.amax, amax))
