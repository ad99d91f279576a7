"""The one place where an op's implementation is chosen.

A choice is made at start, with its reason, and said aloud; nothing falls back silently later.
"""

from dataclasses import dataclass

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from phi4.config import KernelsConfig
from phi4.engine.attention import CoreAttention, Phi4SelfAttention
from phi4.engine.layers import Phi4Layer, RMSNorm, SwiGLU
from phi4.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """An op, the implementation that serves it in this run, and why."""

    op: str
    implementation: str
    reason: str

    def describe(self) -> str:
        """One line for the console."""
        return f"{self.op}: {self.implementation} ({self.reason})"


def choose(kernels: KernelsConfig) -> tuple[Choice, ...]:
    """The implementation of every op.

    Raises:
        ConfigError: an implementation was named that this version does not have.
    """
    choices = []
    for op, asked in kernels.model_dump().items():
        if asked not in ("auto", "torch"):
            raise ConfigError(
                f"kernels.{op}={asked} is not available in the engine yet; use auto or torch"
            )
        reason = "the only implementation in the engine" if asked == "auto" else "asked for"
        choices.append(Choice(op, "torch", reason))
    return tuple(choices)


def block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one model chunk and the final norm."""
    layer = ModuleSpec(
        module=Phi4Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=Phi4SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CoreAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            pre_mlp_layernorm=RMSNorm,
            mlp=SwiGLU,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
