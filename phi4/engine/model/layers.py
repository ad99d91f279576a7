"""The transformer layer: megatron-core's, with our norm and SwiGLU and no dropout or bias paths.

These are subclasses of megatron-core's own modules, so parallel linears, sharding of checkpoints,
recompute and pipeline splitting are megatron's. The spec sets `implementation` of a module.
"""

from typing import NamedTuple

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from phi4_kernels.rms_norm import add_rms_norm, rms_norm
from phi4_kernels.swiglu import swiglu, swiglu_linear

from phi4.engine.model.hook_arguments import refuse
from phi4.engine.model.micro_batch import Documents
from phi4.engine.model.weight_gradients import AddsItsOwnGradient, SwiGLULinearIntoMainGrad

_LAYER = dict.fromkeys(
    (
        "attention_mask",
        "context",
        "context_mask",
        "rotary_pos_emb",
        "rotary_pos_cos",
        "rotary_pos_sin",
        "rotary_pos_cos_sin",
        "attention_bias",
        "inference_context",
        "inference_params",
        "sequence_len_offset",
        "padding_mask",
    )
)
"""Arguments of megatron-core's call that must be None; see `refuse`."""

_LINEAR = {
    "bias": None,
    "gradient_accumulation_fusion": True,
    "allreduce_dgrad": False,
    "sequence_parallel": False,
    "tp_group": None,
    "grad_output_buffer": None,
}


class Linears(NamedTuple):
    """The classes of a layer's linears, or megatron-core's specs of them."""

    column: type[ColumnParallelLinear] | ModuleSpec = ColumnParallelLinear
    row: type[RowParallelLinear] | ModuleSpec = RowParallelLinear


class RMSNorm(torch.nn.Module):
    """Root mean square norm whose weight gradient is summed over tensor ranks under SP.

    Signature of megatron-core's norm hook. Source: Zhang and Sennrich 2019, equation 4.
    """

    implementation = "torch"

    def __init__(self, config, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # finalize_model_grads all-reduces the gradient of parameters with this mark over tp.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same shape and dtype; statistics in fp32."""
        return rms_norm(x, self.weight, self.eps, implementation=self.implementation)


class AddRMSNorm(RMSNorm):
    """The norm of a sum that the residual stream needs as well.

    A separate module, not a second method of RMSNorm: under overlap_param_gather megatron-core
    waits for a parameter in its module's forward pre-hook, which only a module call runs.
    """

    def forward(  # type: ignore[override]  # a module of torch has any signature
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm of x + residual, x + residual), each of shape [..., hidden]."""
        return add_rms_norm(x, residual, self.weight, self.eps, implementation=self.implementation)


class SwiGLU(MLP):
    """megatron-core's MLP with the product silu(gate) * up.

    A kernel's product is part of the linear that reads it, so that neither is kept for backward,
    unless that linear keeps it in FP8.
    """

    implementation = "torch"
    linears = Linears()

    def __init__(self, config) -> None:
        column, row = self.linears
        self._is_fused = self.implementation != "torch" and row is RowParallelLinear
        fused = ModuleSpec(SwiGLULinear, params={"implementation": self.implementation})
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=column, linear_fc2=fused if self._is_fused else row),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states: torch.Tensor, **others: object) -> tuple[torch.Tensor, None]:
        """[S, B, hidden] to the same shape, and no bias.

        Raises:
            ConfigError: another argument of megatron-core's is set; see `refuse`.

        Collectives: as the two parallel linears (gather in, reduce out over tp).
        """
        refuse("SwiGLU", others, {"per_token_scale": None})
        gate_up, _ = self.linear_fc1(hidden_states)
        if not self._is_fused:
            gate_up = swiglu(gate_up, implementation=self.implementation)
        output, _ = self.linear_fc2(gate_up)
        return output, None


class SwiGLULinear(RowParallelLinear):
    """megatron-core's linear after SwiGLU, with [gate | up] as input instead of their product."""

    def __init__(self, *args, implementation: str, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.implementation = implementation

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, **others: object
    ) -> torch.Tensor:
        """megatron-core's hook for the local product: [S, B, 2F / tp] to [S, B, hidden].

        Raises:
            ConfigError: another argument of megatron-core's is set; see `refuse`.
        """
        refuse("SwiGLU's second linear", others, _LINEAR)
        rows, main_grad = input.flatten(0, 1), getattr(weight, "main_grad", None)
        if main_grad is None or not torch.is_grad_enabled():
            rows = swiglu_linear(rows, weight, implementation=self.implementation)
        else:
            own = AddsItsOwnGradient.apply(weight)
            rows = SwiGLULinearIntoMainGrad.apply(rows, own, main_grad, self.implementation)
        return rows.unflatten(0, input.shape[:2])


class Phi4Layer(TransformerLayer):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def forward(
        self, hidden_states: torch.Tensor, *, packed_seq_params: Documents, **others: object
    ) -> tuple[torch.Tensor, None]:
        """[S, B, hidden] (S / tp under SP) to the same shape, and no context.

        Raises:
            ConfigError: another argument of megatron-core's is set; see `refuse`.
        """
        refuse("layer", others, _LAYER)
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states), packed_seq_params=packed_seq_params
        )
        normed, hidden_states = self.pre_mlp_layernorm(attended, hidden_states)
        transformed, _ = self.mlp(normed)
        return hidden_states + transformed, None
