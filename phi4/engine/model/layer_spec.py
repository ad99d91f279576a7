"""The layers of a model chunk, as megatron-core's spec: which class serves which place."""

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from phi4_kernels.dispatch import Choice

from phi4.engine.model.attention import CoreAttention, Phi4SelfAttention
from phi4.engine.model.implementations import implementation_of
from phi4.engine.model.layers import AddRMSNorm, Phi4Layer, RMSNorm, SwiGLU


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
