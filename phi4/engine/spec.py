"""The one place where an op's implementation is chosen.

A choice is made at start, with its reason, and said aloud; nothing falls back silently later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from phi4_kernels import dispatch, native
from phi4_kernels.attention.op import HEAD_DIMS
from phi4_kernels.errors import KernelError

from phi4.config import KernelsConfig
from phi4.engine.attention import CoreAttention, Phi4SelfAttention
from phi4.engine.layers import AddRMSNorm, Phi4Layer, RMSNorm, SwiGLU
from phi4.errors import ConfigError

_NATIVE = ("adamw", "grad_norm")
"""Ops of the optimizer, whose kernels are csrc's."""


@dataclass(frozen=True)
class Choice:
    """An op, the implementation that serves it in this run, and why."""

    op: str
    implementation: str
    reason: str

    def describe(self) -> str:
        """One line for the console."""
        return f"{self.op}: {self.implementation} ({self.reason})"


def choose(
    kernels: KernelsConfig, device: torch.device, head_dim: int = HEAD_DIMS[0]
) -> tuple[Choice, ...]:
    """The implementation of every op on a device, for attention heads of this width.

    Raises:
        ConfigError: an implementation was named that does not exist or cannot run here.
    """
    choices = (_choose(op, asked, device) for op, asked in kernels.model_dump().items())
    return tuple(_for_heads(choice, kernels, head_dim) for choice in choices)


def _choose(op: str, asked: str, device: torch.device) -> Choice:
    registered = native if op in _NATIVE else dispatch
    try:
        choice = registered.choose(op, asked, device)
    except KernelError as error:
        raise ConfigError(f"kernels.{op}={asked}: {error}") from error
    return Choice(op, choice.implementation, choice.reason)


def _for_heads(choice: Choice, kernels: KernelsConfig, head_dim: int) -> Choice:
    """The choice, if attention's kernels take heads of this width; torch takes any."""
    named = choice.implementation
    if choice.op != "attention" or named == "torch" or head_dim in HEAD_DIMS:
        return choice
    widths = f"{named} takes head dims {', '.join(map(str, HEAD_DIMS))}, the model's is {head_dim}"
    if kernels.attention != "auto":
        raise ConfigError(f"kernels.attention={named}: {widths}; use auto or torch")
    return Choice(choice.op, "torch", f"auto: {widths}")


def implementation_of(op: str, choices: Sequence[Choice]) -> str:
    """The chosen implementation of an op; torch where nothing was chosen."""
    return next((choice.implementation for choice in choices if choice.op == op), "torch")


def block_spec(num_layers: int, choices: Sequence[Choice] = ()) -> TransformerBlockSubmodules:
    """The layers of one model chunk and the final norm.

    Args:
        num_layers: of this chunk.
        choices: of `choose`; ops without one are torch's.
    """
    implementation = implementation_of("rms_norm", choices)
    norm = _on(RMSNorm, implementation)
    layer = ModuleSpec(
        module=Phi4Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=_on(Phi4SelfAttention, implementation_of("rope", choices)),
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=_on(CoreAttention, implementation_of("attention", choices)),
                    linear_proj=RowParallelLinear,
                ),
            ),
            pre_mlp_layernorm=_on(AddRMSNorm, implementation),
            mlp=_on(SwiGLU, implementation_of("swiglu", choices)),
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _on(module: type[torch.nn.Module], implementation: str) -> type[torch.nn.Module]:
    """The module with its op's implementation.

    A class, because megatron-core warns of every ModuleSpec whose MLP is not one of its own.
    """
    return type(module.__name__, (module,), {"implementation": implementation})
