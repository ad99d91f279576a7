"""Tensors in FP8; the stand-in makes none that are parameters."""

import sys

import torch

from transformer_engine.pytorch.tensor import master_weights


class QuantizedTensor(torch.Tensor):
    """Base of them."""


# Its name in Transformer Engine, which no file of ours may have.
sys.modules[f"{__name__}.utils"] = master_weights
