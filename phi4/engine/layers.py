"""The transformer layer: megatron-core's, with our norm and SwiGLU and no dropout or bias paths.

Subclasses of megatron-core's own modules, so parallel linears, sharding of checkpoints, recompute
and pipeline splitting stay megatron's.
"""

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer


class RMSNorm(torch.nn.Module):
    """Root mean square norm whose weight gradient is summed over tensor ranks under SP.

    Signature of megatron-core's norm hook. Source: Zhang and Sennrich 2019, equation 4.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # finalize_model_grads all-reduces the gradient of parameters so marked over tp.
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same shape and dtype; statistics in fp32."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(MLP):
    """megatron-core's MLP with the product silu(gate) * up.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2.
    """

    def __init__(self, config) -> None:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(
            config,
            linears,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        """[S, B, hidden] to the same shape, and no bias.

        Collectives: as the two parallel linears (gather in, reduce out over tp).
        """
        gate_up, _ = self.linear_fc1(hidden_states)
        gate, up = gate_up.chunk(2, dim=-1)
        output, _ = self.linear_fc2(F.silu(gate) * up)
        return output, None


class Phi4Layer(TransformerLayer):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        *,
        packed_seq_params=None,
        **_: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, hidden] (S / tp under SP) to the same shape; context passes through."""
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask,
            packed_seq_params=packed_seq_params,
        )
        hidden_states = hidden_states + attended
        transformed, _ = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + transformed, context
