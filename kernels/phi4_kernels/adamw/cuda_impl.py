"""AdamW by csrc's kernel, registered as `phi4::adamw_`."""

from collections.abc import Sequence

from torch import Tensor

from phi4_kernels import operators
from phi4_kernels.adamw.arguments import Hyper, ParameterShard, device_scalars


def adamw(
    shards: Sequence[ParameterShard],
    step: int | Tensor,
    hyper: Hyper,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See op.adamw, whose checks have passed."""
    scalars = device_scalars(step, hyper, grad_scale, found_inf)
    fp8 = [shard.fp8 for shard in shards if shard.fp8 is not None]
    _adamw(
        [shard.param for shard in shards],
        [shard.exp_avg for shard in shards],
        [shard.exp_avg_sq for shard in shards],
        [shard.grad for shard in shards],
        [shard.weight for shard in shards if shard.weight is not None],
        [weight.data for weight in fp8],
        [weight.scale for weight in fp8],
        [weight.amax for weight in fp8],
        *(tensor for tensor, _ in scalars.values()),
        # The kernel reads these from the device where a tensor is given, and ignores the number.
        0.0 if isinstance(hyper.lr, Tensor) else hyper.lr,
        hyper.beta1,
        hyper.beta2,
        hyper.eps,
        hyper.weight_decay,
        1 if isinstance(step, Tensor) else step,
    )


_adamw = operators.register_cuda(
    "adamw_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] grads, "
    "Tensor(d!)[] weights, Tensor(e!)[] fp8_weights, Tensor[] fp8_scales, Tensor(f!)[] fp8_amaxes, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? device_lr, Tensor? device_step, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    lambda *args: None,
)
