"""Operations that megatron-core names in annotations."""

from transformer_engine.pytorch.not_here import NotHere

FusibleOperation = Sequential = NotHere
