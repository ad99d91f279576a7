"""AdamW as a torch optimizer, a drop-in replacement for apex's FusedAdam.

The contract: the step count lives in the parameter group, the moments are `exp_avg` and
`exp_avg_sq`, and `capturable`, `master_weights`, `grad_scale` and `found_inf` have the meaning that
apex and torch.amp.GradScaler give them. The op is called once per parameter group.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.adamw.arguments import Hyper, ParameterShard
from phi4_kernels.adamw.op import adamw
from phi4_kernels.errors import DtypeError, ImplementationError, ShapeError


class FusedAdam(torch.optim.Optimizer):
    """Decoupled weight decay Adam.

    Args:
        params: parameters or groups; fp32, or bf16 with master_weights.
        lr: learning rate; per group a float, or with capturable a [] tensor that replays read.
        bias_correction: must be True.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment after bias correction.
        adam_w_mode: must be True; L2 regularisation is not offered.
        weight_decay: decoupled.
        amsgrad: must be False.
        set_grad_none: what zero_grad does with gradients.
        capturable: the step count is a [] int64 tensor on the parameters' device, so that a CUDA
            graph can capture the step; an overflow is then skipped without a synchronisation.
        master_weights: bf16 parameters get an fp32 copy, `master_param` in their state; both are
            written in the same pass.
        implementation: of the op; see dispatch.choose.

    Raises:
        ImplementationError: an option that is not offered.

    Source: Loshchilov and Hutter 2019, algorithm 2; apex.optimizers.FusedAdam for the contract.
    """

    _step_supports_amp_scaling = True
    """Tells torch.amp.GradScaler to set `grad_scale` and `found_inf` in place of unscaling."""
    grad_scale: Tensor
    """Set around a step: gradients are divided by it."""
    found_inf: Tensor
    """Set around a step: where it is not 0 nothing changes."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        *,
        implementation: str = "auto",
    ) -> None:
        offered = {"bias_correction": True, "adam_w_mode": True, "amsgrad": False}
        asked = {
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
            "amsgrad": amsgrad,
        }
        for name, value in asked.items():
            if value != offered[name]:
                raise ImplementationError(
                    f"FusedAdam: got {name}={value}; expected {offered[name]}, the only form that "
                    "is offered; leave it out, or use torch.optim"
                )
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.set_grad_none = set_grad_none
        self.capturable = capturable
        self.master_weights = master_weights
        self.implementation = implementation

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Set gradients to None or to zero; without an argument, set_grad_none decides."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what the closure returned.

        Raises:
            DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self.update(
            grad_scale=None if scale is None else _scalar(scale.float().reciprocal()),
            found_inf=None if found is None else _scalar(found.float()),
        )
        # The host counts the step before it knows whether the device skipped it.
        if found is not None and not self.capturable and bool(found):
            self.retract()
        return loss

    @torch.no_grad()
    def update(
        self,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        weights: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """Enqueue the update of every parameter that has a gradient, without a synchronisation.

        Args:
            grad_scale: [], fp32: multiplies the gradients.
            found_inf: [], fp32: where it is not 0 nothing is written. A step count on the host
                advances nevertheless, until `retract`; with `capturable` it does not.
            weights: by parameter, a bf16 tensor of its size that is written in the same pass.
        """
        for group in self.param_groups:
            shards = [
                self._shard(param, (weights or {}).get(param))
                for param in group["params"]
                if param.grad is not None
            ]
            if not shards:
                continue
            step = self._advanced(group, shards[0].param.device, found_inf)
            lr, (beta1, beta2) = group["lr"], group["betas"]
            hyper = Hyper(
                lr=_scalar(lr.double()) if isinstance(lr, Tensor) else lr,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            for alike in _alike(shards):
                adamw(
                    alike,
                    step,
                    hyper,
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                    implementation=self.implementation,
                )

    def retract(self) -> None:
        """Undo what an update that found_inf suppressed did to the step counts on the host."""
        if self.capturable:
            return
        for group in self.param_groups:
            if any(param.grad is not None for param in group["params"]):
                group["step"] -= 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state stays fp32 also for bf16 parameters."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, index in zip(group["params"], saved["params"], strict=True):
                # torch casts state to the parameter's dtype, which would round fp32 moments to
                # bf16.
                if param.dtype != torch.float32 and index in state_dict["state"]:
                    self.state[param] = {
                        name: value.to(param.device, copy=True)
                        for name, value in state_dict["state"][index].items()
                    }

    def _shard(self, param: Tensor, weight: Tensor | None) -> ParameterShard:
        assert param.grad is not None, "parameters without a gradient are passed over"
        if param.grad.is_sparse:
            raise ImplementationError("FusedAdam: got a sparse gradient; expected a dense one")
        state = self.state[param]
        if param.dtype == torch.float32:
            master = param
        elif param.dtype == torch.bfloat16 and self.master_weights:
            if "master_param" not in state:
                state["master_param"] = param.detach().float()
            master, weight = state["master_param"], param
        else:
            raise DtypeError(
                f"FusedAdam: a parameter is {param.dtype}; expected torch.float32, or "
                "torch.bfloat16 with master_weights=True"
            )
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(master, memory_format=torch.contiguous_format)
        return ParameterShard(
            _flat("param", master),
            _flat("exp_avg", state["exp_avg"]),
            _flat("exp_avg_sq", state["exp_avg_sq"]),
            _flat("grad", param.grad.contiguous()),
            None if weight is None else _flat("weight", weight),
        )

    def _advanced(
        self, group: dict[str, Any], device: torch.device, found_inf: Tensor | None
    ) -> int | Tensor:
        """The group's step count after this update, in the form that `capturable` requires."""
        before = group.get("step", 0)
        if not self.capturable:
            group["step"] = int(before) + 1
            return group["step"]
        if not isinstance(before, Tensor):
            before = torch.full((), before, dtype=torch.int64, device=device)
        before = _scalar(before.to(device, torch.int64))
        # On the device: a skipped step is not counted, without a synchronisation.
        group["step"] = before.add_(1 if found_inf is None else found_inf == 0)
        return group["step"]


def _scalar(tensor: Tensor) -> Tensor:
    return tensor.reshape(())


def _flat(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ShapeError(
            f"FusedAdam: {name} has stride {tensor.stride()}; expected a contiguous tensor; an "
            "update in place needs the buffer itself, not a copy"
        )
    flat = tensor.detach()
    return flat if flat.dim() == 1 else flat.view(-1)


def _alike(shards: list[ParameterShard]) -> list[list[ParameterShard]]:
    """Shards that one call of the op takes."""
    kinds: dict[Any, list[ParameterShard]] = {}
    for shard in shards:
        # All shards of a launch have gradients of one dtype, and all or none have a weight.
        kind = (shard.weight is None, shard.grad.dtype, shard.param.device)
        kinds.setdefault(kind, []).append(shard)
    return list(kinds.values())
