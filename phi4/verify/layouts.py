"""The layouts that parity is checked for, each as overrides of a recipe."""

from dataclasses import dataclass

from phi4.config import Recipe, violations, with_overrides
from phi4.errors import ConfigError

_SINGLE = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.context=1",
    "parallel.data=1",
    "parallel.sequence=false",
    "parallel.context_attention='all_gather'",
    "parallel.overlap_p2p=false",
    "parallel.distributed_optimizer=false",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
    "parallel.fp8_param_gather=false",
    "recompute.granularity='none'",
    "precision.dtype='fp32'",
    # Sums in another order change values that are rounded to 3 bits; tests/engine/fp8 checks
    # layouts with FP8.
    "precision.fp8='off'",
)

_TP2, _PP2, _CP2, _DP2 = (
    f"parallel.{axis}=2" for axis in ("tensor", "pipeline", "context", "data")
)
_SP = "parallel.sequence=true"
_RING = "parallel.context_attention='ring'"
_VPP2 = "parallel.virtual_pipeline=2"
_DISTRIBUTED = "parallel.distributed_optimizer=true"

LAYOUTS: dict[str, tuple[str, ...]] = {
    "recompute-selective": ("recompute.granularity='selective'",),
    "recompute-full": ("recompute.granularity='full'",),
    "tp2": (_TP2,),
    "tp2+sp": (_TP2, _SP),
    "pp2": (_PP2,),
    "pp4": ("parallel.pipeline=4",),
    "pp2-uneven": (_PP2, "parallel.layers_per_stage=[5, 3]"),
    "pp2-vpp2": (_PP2, _VPP2, "parallel.overlap_p2p=true"),
    "pp4-vpp2": ("parallel.pipeline=4", _VPP2),
    "cp2": (_CP2,),
    "cp2-ring": (_CP2, _RING),
    "cp4": ("parallel.context=4",),
    "cp4-ring": ("parallel.context=4", _RING),
    "dp2": (_DP2,),
    "dp2-distributed": (_DP2, _DISTRIBUTED),
    "dp2-overlapped": (
        _DP2,
        _DISTRIBUTED,
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ),
    "tp2xpp2+sp": (_TP2, _PP2, _SP),
    "tp2xcp2+sp": (_TP2, _CP2, _SP),
    "tp2xcp2+sp-ring": (_TP2, _CP2, _SP, _RING),
    "pp2xcp2-ring+recompute": (_PP2, _CP2, _RING, "recompute.granularity='selective'"),
    "dp2xtp2": (_DP2, _TP2),
}
"""Layout name -> overrides of the single-process recipe."""

LEAK_LAYOUTS = (
    "recompute-selective",
    "recompute-full",
    "tp2",
    "tp2+sp",
    "pp2",
    "cp2",
    "cp2-ring",
    "cp4",
    "cp4-ring",
    "tp2xcp2+sp",
    "tp2xcp2+sp-ring",
    "pp2xcp2-ring+recompute",
)
"""Layouts in which documents cross rank boundaries; data ranks only sum their results."""

BITWISE = frozenset({"recompute-selective", "recompute-full"})
"""Layouts that only recompute activations."""


@dataclass(frozen=True)
class LayoutCase:
    """A recipe in one layout."""

    name: str
    recipe: Recipe

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.recipe.parallel.model_parallel_size * self.recipe.parallel.data


def reference_case(recipe: Recipe) -> LayoutCase:
    """Return the recipe on one process, in fp32."""
    single = recipe.model_copy(
        update={"parallel": recipe.parallel.model_copy(update={"layers_per_stage": None})}
    )
    return LayoutCase("one process", with_overrides(single, _SINGLE))


def names_of(text: str, default: tuple[str, ...]) -> tuple[str, ...]:
    """Return layout names of a comma-separated list; the default if it is empty.

    Raises:
        ConfigError: no layout has that name.
    """
    names = tuple(name for name in text.split(",") if name) or default
    for name in names:
        if name not in LAYOUTS:
            raise ConfigError(f"unknown layout {name}; known are {', '.join(LAYOUTS)}")
    return names


def cases(recipe: Recipe, names: tuple[str, ...]) -> tuple[list[LayoutCase], dict[str, str]]:
    """Return cases that the recipe's rules allow, and for the others the violated rule."""
    single, possible, impossible = reference_case(recipe).recipe, [], {}
    for name in names:
        case = LayoutCase(name, with_overrides(single, LAYOUTS[name]))
        broken = violations(case.recipe)
        if broken:
            impossible[name] = "; ".join(broken)
        else:
            possible.append(case)
    return possible, impossible
