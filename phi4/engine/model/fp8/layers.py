"""Build the linears of layers with FP8, and apply operations to all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from phi4_kernels.dispatch import Choice

from phi4.config import Recipe
from phi4.config.fp8_rules import fp8_layers
from phi4.engine.model.fp8.linear import FP8ColumnLinear, FP8RowLinear
from phi4.engine.model.fp8.linear_products import FP8Products
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
    """Return the linears of some layers.

    Args:
        recipe: recipe of the run.
        layers: global layer indices from 0.
        context_group: ranks that hold other tokens of the same rows.
        choices: from `choose`; gives the implementation of `fp8_cast`.
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
    """Return the FP8 linears of model chunks, in order."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, FP8Products):
                yield module


def forget_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Invalidate cached casts after a change of the weights: each is cast again when it is next
    used."""
    for linear in fp8_linears(chunks):
        linear.forget_weight()
    for _, te_linear in te_linears(chunks):
        te_linear.forget_weight()
