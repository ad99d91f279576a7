"""Which layers of a model multiply in FP8, and what all of their linears have in common."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from phi4_kernels.dispatch import Choice

from phi4.config import Recipe
from phi4.config.fp8_rules import fp8_layers
from phi4.engine.model.fp8.linear import FP8ColumnLinear, FP8Products, FP8RowLinear
from phi4.engine.model.fp8.recipe import SCALINGS
from phi4.engine.model.fp8.te_backend import te_layer_linears
from phi4.engine.model.fp8.te_state import te_linears
from phi4.engine.model.implementations import implementation_of
from phi4.engine.model.layers import Linears


def layer_linears(
    recipe: Recipe,
    layers: Sequence[int],
    context_group: dist.ProcessGroup,
    choices: Sequence[Choice],
) -> list[Linears]:
    """The linears of some layers.

    Args:
        recipe: of the run.
        layers: by their numbers in the whole model from 0.
        context_group: ranks that hold other tokens of the same rows.
        choices: of `choose`: what serves `fp8_cast`.
    """
    precision, plain = recipe.precision, Linears()
    if precision.fp8 == "off":
        return [plain] * len(layers)
    if precision.fp8 == "te":
        fp8 = te_layer_linears()
    else:
        implementation = implementation_of("fp8_cast", choices)
        scaling = replace(SCALINGS[precision.fp8_recipe], implementation=implementation)
        common = {"scaling": scaling, "context_group": context_group}
        fp8 = Linears(ModuleSpec(FP8ColumnLinear, common), ModuleSpec(FP8RowLinear, common))
    in_fp8 = fp8_layers(recipe)
    return [fp8 if layer in in_fp8 else plain for layer in layers]


def fp8_linears(chunks: Sequence[torch.nn.Module]) -> Iterator[FP8Products]:
    """Those of model chunks, in order."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, FP8Products):
                yield module


def forget_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Weights may be others from now on: each is cast again when it is next read."""
    for linear in fp8_linears(chunks):
        linear.forget_weight()
    for _, te_linear in te_linears(chunks):
        te_linear.forget_weight()
