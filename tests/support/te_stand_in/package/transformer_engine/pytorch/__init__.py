"""torch's side of the stand-in."""

from transformer_engine.pytorch import distributed, fp8, module, ops, optimizers, tensor
from transformer_engine.pytorch.module.linear import Linear
from transformer_engine.pytorch.not_here import NotHere
from transformer_engine.pytorch.quantization import fp8_autocast, fp8_model_init

DotProductAttention = GroupedLinear = LayerNorm = LayerNormLinear = RMSNorm = NotHere
Fp8Padding = Fp8Unpadding = NotHere
__all__ = [
    "Linear",
    "distributed",
    "fp8",
    "fp8_autocast",
    "fp8_model_init",
    "module",
    "ops",
    "optimizers",
    "tensor",
]
