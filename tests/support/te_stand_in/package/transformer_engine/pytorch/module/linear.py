"""A linear whose products read FP8, multiplied by torch in fp32."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from transformer_engine.interface import checked
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, get_dummy_wgrad
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, dtype_of

_BLOCK = 128
_PLACES = {
    "input": ("scaling_fwd", 0),
    "weight": ("scaling_fwd", 1),
    "grad_output": ("scaling_bwd", 0),
}


class Linear(TransformerEngineBaseModule):
    """Column, row or no parallelism; no bias."""

    @checked("Linear.__init__")
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        **others: Any,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in others.items() if value}
        if bias or return_bias or given:
            raise NotImplementedError(f"a bias and {given} are no part of the stand-in")
        self.tp_group, self.tp_size = tp_group, tp_group.size() if tp_group else tp_size
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.save_original_input = bias, False
        weight = torch.full(
            (self.out_features, self.in_features), torch.nan, device=device, dtype=params_dtype
        )
        self.weight = torch.nn.Parameter(weight)
        init_method(self.weight)
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = 1 if parallel_mode == "row" else 0
        self.weight.partition_stride = 1
        self.weight_in_fp8: torch.Tensor | None = None
        self.num_weight_casts = self.num_fp8_products = 0

    @checked("Linear.forward")
    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> torch.Tensor:
        """x w^T."""
        if fp8_output or fp8_grad:
            raise NotImplementedError("results in FP8 are no part of the stand-in")
        assert inp.dtype == self.weight.dtype
        self.enter()
        return _Products.apply(self.weight, inp, self, is_first_microbatch)

    def cast(self, x_TF: torch.Tensor, name: str, *, is_split: bool = False) -> torch.Tensor:
        """What a product reads of a matrix, in fp32.

        Args:
            x_TF: values.
            name: of the matrix.
            is_split: whether the tensor ranks hold other rows of what has one scale.
        """
        if not self.fp8:
            return x_TF.float()
        recipe = self.fp8_meta["recipe"]
        dtype = dtype_of(recipe, is_value=name != "grad_output")
        if recipe.float8_block_scaling():
            blocks = x_TF.float().unflatten(-1, (-1, _BLOCK))
            return _rounded(blocks, dtype, blocks.abs().amax(-1, keepdim=True)).flatten(-2)
        amax = x_TF.float().abs().amax()
        if recipe.delayed():
            key, at = _PLACES[name]
            state = self.fp8_meta[key]
            state.amax_history[0, at] = torch.maximum(state.amax_history[0, at], amax)
            return _rounded(x_TF.float(), dtype, torch.finfo(dtype).max / state.scale[at].clone())
        if is_split:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.tp_group)
        return _rounded(x_TF.float(), dtype, amax)

    def cast_weight(self, is_first_microbatch: bool | None) -> torch.Tensor:
        """The weight in FP8, kept until it is the first micro-batch again."""
        if not self.fp8:
            return self.weight.detach().float()
        if is_first_microbatch is None or is_first_microbatch:
            self.num_weight_casts += 1
            self.weight_in_fp8 = self.cast(self.weight.detach(), "weight")
        return self.weight_in_fp8


def _rounded(x: torch.Tensor, dtype: torch.dtype, amax: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    scale = torch.where(amax > 0, largest / amax, 1.0)
    return (x * scale).clamp(-largest, largest).to(dtype).float() / scale


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, inp: torch.Tensor, linear: Linear, is_first: bool | None
    ) -> torch.Tensor:
        gathers = linear.parallel_mode == "column" and linear.sequence_parallel
        x_TI = linear.cast(inp.flatten(0, -2), "input", is_split=gathers)
        w_OI = linear.cast_weight(is_first)
        linear.num_fp8_products += linear.fp8
        ctx.saved = x_TI, w_OI, weight
        ctx.linear, ctx.is_first, ctx.gathers, ctx.shape = linear, is_first, gathers, inp.shape
        ctx.closes_backward = linear.fp8 and FP8GlobalStateManager.IS_FIRST_FP8_MODULE
        if ctx.closes_backward:
            FP8GlobalStateManager.IS_FIRST_FP8_MODULE = False
        y_TO = ((_gathered(x_TI, linear) if gathers else x_TI) @ w_OI.t()).to(inp.dtype)
        if linear.parallel_mode == "row":
            y_TO = _summed(y_TO, linear)
        return y_TO.unflatten(0, (-1, *inp.shape[1:-1]))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        linear, (x_TI, w_OI, weight) = ctx.linear, ctx.saved
        gathers = linear.parallel_mode == "row" and linear.sequence_parallel
        g_TO = linear.cast(grad.flatten(0, -2), "grad_output", is_split=gathers)
        g_TO = _gathered(g_TO, linear) if gathers else g_TO
        linear.num_fp8_products += 2 * linear.fp8
        dx_TI = (g_TO @ w_OI).to(grad.dtype)
        if linear.parallel_mode == "column":
            dx_TI = _summed(dx_TI, linear)
        dw_OI = g_TO.t() @ (_gathered(x_TI, linear) if ctx.gathers else x_TI)
        if linear.fuse_wgrad_accumulation:
            # The first micro-batch's gradient takes the place of what is there.
            if ctx.is_first:
                weight.main_grad.copy_(dw_OI)
            else:
                weight.main_grad.add_(dw_OI)
            weight.grad_added_to_main_grad = True
            dw = get_dummy_wgrad(list(weight.shape), weight.dtype)
        else:
            dw = dw_OI.to(weight.dtype)
        if ctx.closes_backward:
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return dw, dx_TI.view(ctx.shape), None, None


def _gathered(x_TF: torch.Tensor, linear: Linear) -> torch.Tensor:
    whole = x_TF.new_empty(x_TF.shape[0] * linear.tp_size, x_TF.shape[1])
    dist.all_gather_into_tensor(whole, x_TF.contiguous(), group=linear.tp_group)
    return whole


def _summed(y_TF: torch.Tensor, linear: Linear) -> torch.Tensor:
    if linear.tp_size == 1:
        return y_TF
    if not linear.sequence_parallel:
        dist.all_reduce(y_TF, group=linear.tp_group)
        return y_TF
    part = y_TF.new_empty(y_TF.shape[0] // linear.tp_size, y_TF.shape[1])
    dist.reduce_scatter_tensor(part, y_TF.contiguous(), group=linear.tp_group)
    return part
