"""A channel that FP8 cannot hold beside the others, and that changes nothing without FP8."""

from collections.abc import Callable

import torch

from phi4.engine.engine import Engine

OUTLIER = 2.0**24
FEATURE = 5


def plant_outlier(engine: Engine, layer: int) -> None:
    """Let a feature of a layer's MLP have a huge gate and count nothing.

    Its `up` row and what reads it are zero, so it adds nothing, has no gradient, and stays as it is
    in training. But the scale of the first matrix follows the largest number.
    """

    def change(whole: dict[str, torch.Tensor], prefix: str) -> None:
        gate_up = whole[f"{prefix}.mlp.linear_fc1.weight"]
        gate_up[FEATURE] = 0.0
        gate_up[FEATURE, 0] = OUTLIER
        gate_up[gate_up.shape[0] // 2 + FEATURE] = 0.0
        whole[f"{prefix}.mlp.linear_fc2.weight"][:, FEATURE] = 0.0

    _change(engine, layer, change)


def plant_hidden_outlier(engine: Engine, layer: int, factor: float) -> None:
    """Scale a channel that a layer's MLP reads, and its norm by the inverse, a power of two.

    Every row of the first matrix has the outlier then. Training would not leave it as it is.
    """

    def change(whole: dict[str, torch.Tensor], prefix: str) -> None:
        whole[f"{prefix}.mlp.linear_fc1.weight"][:, FEATURE] *= factor
        whole[f"{prefix}.pre_mlp_layernorm.weight"][FEATURE] /= factor

    _change(engine, layer, change)


def _change(
    engine: Engine, layer: int, change: Callable[[dict[str, torch.Tensor], str], None]
) -> None:
    whole = {name: tensor.clone() for name, tensor in engine.whole_parameters()}
    prefix = f"decoder.layers.{layer}"
    if f"{prefix}.mlp.linear_fc1.weight" in whole:
        change(whole, prefix)
    engine.load_whole_parameters(whole)
