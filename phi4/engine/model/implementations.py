"""Choose the implementation of each op.

A choice is made at start, with its reason, and logged; there is no later fallback.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from phi4_kernels import dispatch, registry
from phi4_kernels.attention.arguments import ANY_RANGES, HEAD_DIMS
from phi4_kernels.dispatch import Choice
from phi4_kernels.errors import KernelError
from phi4_kernels.evidence import KernelEvidence

from phi4.config import KernelsConfig, Recipe
from phi4.engine.precision import torch_dtype
from phi4.errors import ConfigError

FP8_OPS = ("fp8_cast",)
"""Ops that a model without FP8 never calls."""


def choose(
    kernels: KernelsConfig,
    device: torch.device,
    head_dim: int = HEAD_DIMS[0],
    evidence: KernelEvidence | None = None,
    needs: Mapping[str, str] | None = None,
    unused: Collection[str] = FP8_OPS,
) -> tuple[Choice, ...]:
    """Choose the implementation of every op on a device, for attention heads of this width.

    Args:
        kernels: requested implementations.
        device: device of the tensors.
        head_dim: head dim of the model.
        evidence: proof rows of the implementations; None uses those on this machine.
        needs: see `attention_needs`; None for no requirements.
        unused: see `unused_ops`.

    Raises:
        ConfigError: a requested implementation does not exist, cannot run here or does not support
            the recipe, or an op would fall back to torch although kernels.qualify is `required`.
    """
    of_op = {"attention": needs or {}}
    choices = [
        _choose(op, asked, device, of_op.get(op, {}), evidence)
        for op, asked in kernels.by_op().items()
        if op not in unused
    ]
    choices = [_for_heads(choice, kernels, head_dim) for choice in choices]
    if kernels.qualify == "required":
        _require_kernels(kernels, choices)
    return tuple(choices)


def unused_ops(recipe: Recipe) -> tuple[str, ...]:
    """Return ops that a recipe never calls, which need no choice."""
    precision = recipe.precision
    is_cast = precision.fp8 == "torch" and precision.fp8_recipe == "tensorwise"
    return () if is_cast else FP8_OPS


def attention_needs(recipe: Recipe) -> dict[str, str]:
    """Return requirements of a recipe on attention that not every implementation meets, with their
    keys."""
    precision, context = recipe.precision, recipe.parallel.context
    needs = {registry.need_of(torch_dtype(precision)): f"precision.dtype={precision.dtype}"}
    if context > 1:
        needs[ANY_RANGES] = f"parallel.context={context}"
    if recipe.kernels.deterministic:
        needs[registry.EQUAL_BITS] = "kernels.deterministic=true"
    return needs


def _choose(
    op: str,
    asked: str,
    device: torch.device,
    needs: Mapping[str, str],
    evidence: KernelEvidence | None,
) -> Choice:
    try:
        return dispatch.choose(op, asked, device, needs=tuple(needs), evidence=evidence)
    except KernelError as error:
        keys = [key for need, key in needs.items() if need in str(error)]
        by = f" (required by {', '.join(keys)})" if keys else ""
        raise ConfigError(f"kernels.{op}={asked}: {error}{by}") from error


def _require_kernels(kernels: KernelsConfig, choices: Sequence[Choice]) -> None:
    """Raise an error for ops that fall back to torch in a run that requires proven kernels."""
    asked = kernels.by_op()
    left = [c for c in choices if c.implementation == "torch" and asked[c.op] == "auto"]
    if left:
        raise ConfigError(
            f"kernels.qualify=required, but {'; '.join(choice.describe() for choice in left)}; see "
            "`phi4 kernels qualify`, choose torch explicitly by kernels.OP=torch, or use "
            "kernels.qualify=on"
        )


def _for_heads(choice: Choice, kernels: KernelsConfig, head_dim: int) -> Choice:
    """Return the choice if attention's kernels support heads of this width; torch supports any."""
    named = choice.implementation
    if choice.op != "attention" or named == "torch" or head_dim in HEAD_DIMS:
        return choice
    widths = (
        f"{named} supports head dims {', '.join(map(str, HEAD_DIMS))}, but the model's is "
        f"{head_dim}"
    )
    if kernels.attention != "auto":
        raise ConfigError(f"kernels.attention={named}: {widths}; use auto or torch")
    return replace(choice, implementation="torch", reason=f"auto: {widths}")


def implementation_of(op: str, choices: Sequence[Choice]) -> str:
    """Return the chosen implementation of an op; torch if nothing was chosen."""
    return next((choice.implementation for choice in choices if choice.op == op), "torch")


def decoding_implementation(attention: str) -> str:
    """Return the implementation for a cache's blocks under the chosen implementation of attention.

    Triton supports this form, and runs wherever the implementations without it do.
    """
    return attention if registry.provides("attention", attention, "decode") else "triton"


def gathering_implementation(attention: str) -> str:
    """Return the implementation for gathered keys of a cache under the chosen implementation of
    attention.

    There a document has more keys than queries, which Triton supports; it runs wherever the
    implementations without this form do.
    """
    return "triton" if registry.unserved("attention", attention, (ANY_RANGES,)) else attention
