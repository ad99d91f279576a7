"""The layers of a model chunk as megatron-core's spec."""

from collections.abc import Sequence

import torch
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from phi4_kernels.dispatch import Choice

from phi4.engine.model.attention import CoreAttention, Phi4SelfAttention
from phi4.engine.model.implementations import implementation_of
from phi4.engine.model.layers import AddRMSNorm, Linears, Phi4Layer, RMSNorm, SwiGLU


def block_spec(
    linears: Sequence[Linears], choices: Sequence[Choice] = ()
) -> TransformerBlockSubmodules:
    """Return the layers of one model chunk and the final norm.

    Args:
        linears: linears of each layer of this chunk.
        choices: from `choose`; ops without one use torch.
    """
    norm = _on(RMSNorm, implementation_of("rms_norm", choices))
    # A spec per kind of layer: every spec creates its own classes.
    by_kind = {id(kind): _layer_spec(kind, choices) for kind in linears}
    specs = [by_kind[id(kind)] for kind in linears]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _layer_spec(linears: Linears, choices: Sequence[Choice]) -> ModuleSpec:
    implementation = implementation_of("rms_norm", choices)
    swiglu = _on(SwiGLU, implementation_of("swiglu", choices), linears=linears)
    return ModuleSpec(
        module=Phi4Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_on(RMSNorm, implementation),
            self_attention=ModuleSpec(
                module=_on(Phi4SelfAttention, implementation_of("rope", choices)),
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.column,
                    core_attention=_on(CoreAttention, implementation_of("attention", choices)),
                    linear_proj=linears.row,
                ),
            ),
            pre_mlp_layernorm=_on(AddRMSNorm, implementation),
            mlp=swiglu,
        ),
    )


def _on(
    module: type[torch.nn.Module], implementation: str, **attributes: object
) -> type[torch.nn.Module]:
    """Return the module with its op's implementation.

    It is a class, because megatron-core warns about every ModuleSpec whose MLP is not one of its
    own.
    """
    return type(module.__name__, (module,), {"implementation": implementation, **attributes})
