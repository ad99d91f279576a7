"""The definition of AdamW with decoupled weight decay, in the dtype of the state.

Source: Loshchilov and Hutter 2019, algorithm 2.
"""

import torch
from torch import Tensor


def adamw(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: int | Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[n] each; step is the number of this update, from 1.

    Returns:
        The new (param, exp_avg, exp_avg_sq).
    """
    grad = grad.to(param.dtype)
    if grad_scale is not None:
        grad = grad * grad_scale.to(param.dtype)
    # Scalars in fp64: 1 - beta2 ** step loses four digits in fp32 at the first step.
    power = torch.as_tensor(step, dtype=torch.float64, device=param.device)
    lr = torch.as_tensor(lr, dtype=torch.float64, device=param.device)
    # lr / (1 - beta1^t): the bias correction of m, once for all elements
    step_size = (lr / (1 - beta1**power)).to(param.dtype)
    root_correction = torch.sqrt(1 - beta2**power).to(param.dtype)
    # Decoupled: the weight shrinks by lr * weight_decay, whatever its gradient.
    decay = (1 - lr * weight_decay).to(param.dtype)
    # m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2
    exp_avg = exp_avg * beta1 + grad * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    # w = w * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    denominator = exp_avg_sq.sqrt() / root_correction + eps
    return param * decay - step_size * exp_avg / denominator, exp_avg, exp_avg_sq
