"""AdamW with the contract of apex's FusedAdam, which megatron-core's optimizers are written for.

The step count lives in the parameter group and the moments are named `exp_avg` and `exp_avg_sq`;
that is what the distributed optimizer saves, reshards and loads.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam.

    Args:
        params: parameters or groups; fp32 (the master weights).
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment after bias correction.
        weight_decay: decoupled.
        adam_w_mode: must be True; L2 regularisation is not offered.

    Source: Loshchilov and Hutter 2019, algorithm 2; apex.optimizers.FusedAdam for the contract.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("adam_w_mode=False asked for; only decoupled weight decay is offered")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
            before = torch.tensor(float(group["step"] - 1), device=params[0].device)
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [before.clone() for _ in params],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
