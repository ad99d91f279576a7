"""Disable FP8 in some layers: their linears then multiply as megatron-core's do."""

from collections.abc import Collection, Iterator, Sequence

import torch

from phi4.engine.model.fp8.linear_products import FP8Products


def linears_by_layer(
    chunks: Sequence[torch.nn.Module],
) -> Iterator[tuple[int, list[FP8Products]]]:
    """Return the FP8 linears of every layer on this rank that has some, in order."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]  # torch: Tensor | Module
            linears = [one for one in layer.modules() if isinstance(one, FP8Products)]
            if linears:
                yield layer.layer_number - 1, linears


def use_fp8_in(chunks: Sequence[torch.nn.Module], layers: Collection[int]) -> None:
    """Enable FP8 in these layers, and disable it in all others."""
    for layer, linears in linears_by_layer(chunks):
        for linear in linears:
            linear.is_plain = layer not in layers
