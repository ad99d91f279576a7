"""Recipes: pydantic's dataclasses, which take and forget keywords that they do not have."""

import dataclasses
from enum import Enum
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from transformer_engine.interface import names_of


class _Largest(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(Enum):
    """FP8 formats of a recipe."""

    E4M3 = _Largest(448, 448)
    E5M2 = _Largest(57344, 57344)
    HYBRID = _Largest(448, 57344)


class Recipe:
    """What a context may be told."""

    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)

    def float8_current_scaling(self) -> bool:
        return isinstance(self, Float8CurrentScaling)

    def float8_block_scaling(self) -> bool:
        return isinstance(self, Float8BlockScaling)


@dataclass()
class DelayedScaling(Recipe):
    """A scale per matrix, from the largest values of earlier micro-batches."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Any = "max"
    scaling_factor_compute_algo: Any = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass()
class Float8CurrentScaling(Recipe):
    """A scale per matrix, from its own largest value."""

    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: Any = None
    fp8_gemm_dgrad: Any = None
    fp8_gemm_wgrad: Any = None
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass()
class Float8BlockScaling(Recipe):
    """A scale per block."""

    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: Any = None
    fp8_gemm_dgrad: Any = None
    fp8_gemm_wgrad: Any = None
    fp8_dpa: bool = False
    fp8_mha: bool = False


for _recipe in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling):
    _fields = [field.name for field in dataclasses.fields(_recipe)]
    assert _fields == names_of(_recipe.__name__), f"{_recipe.__name__} has other fields"
