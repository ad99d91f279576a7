"""The parallel linears in FP8: what they compute, and that every layout has one process' scales."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from phi4.engine.engine import Engine
from phi4.engine.model.fp8.casts import cast
from phi4.engine.model.fp8.linear_products import FP8Products
from phi4.engine.model.fp8.recipe import SCALINGS
from phi4.engine.model.fp8.scales import E4M3
from tests.support.engines import engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

TOKENS, HIDDEN, FFN = 256, 256, 256
SIZES = (
    "model.num_layers=2",
    f"model.hidden_size={HIDDEN}",
    f"model.intermediate_size={FFN}",
    "batch.micro_batch_size=8",
    "precision.fp8=torch",
    "precision.fp8_end_layers_in_bf16=0",
)
LAYOUTS = {
    "tp2": ("parallel.tensor=2",),
    "tp2+sp": ("parallel.tensor=2", "parallel.sequence=true"),
    "cp2": ("parallel.context=2",),
}
WIDTHS = {"linear_fc1": (HIDDEN, 2 * FFN), "linear_fc2": (FFN, HIDDEN)}


class Found(NamedTuple):
    """Whole matrices, put together from the ranks' parts.

    Attributes:
        output: [T, O].
        input_gradient: [T, I].
        weight_gradient: [O, I].
        scales: of each rank, inverses of the casts by their names.
    """

    output: torch.Tensor
    input_gradient: torch.Tensor
    weight_gradient: torch.Tensor
    scales: list[dict[str, torch.Tensor]]


pool = pool_fixture(2)


def given(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input [T, I] with an outlier channel, weight [O, I], gradient [T, O].

    Whatever a rank has of them, its largest magnitude is binades below that of the other's part.
    """
    width, out = WIDTHS[name]
    generator = torch.Generator().manual_seed(7)

    def spread(rows: int, columns: int) -> torch.Tensor:
        matrix = torch.randn(rows, columns, generator=generator)
        down, across = (torch.logspace(-2, 0, size) for size in (rows, columns))
        return matrix * down[:, None] * across

    x = spread(TOKENS, width)
    x[:, 3] *= 30
    return x, spread(out, width) * 0.02, spread(TOKENS, out)


def run(rank: int, world_size: int, name: str, overrides: tuple[str, ...]):
    """This rank's parts, each with the dimension that it is a part of; None without one."""
    with engine_on(rank, tiny_recipe(*SIZES, *overrides)) as engine:
        if engine is None:
            return None
        linear = getattr(engine.bare_chunks[0].decoder.layers[0].mlp, name)
        return parts_of(engine, linear, name)


def parts_of(engine: Engine, linear: FP8Products, name: str) -> dict:
    layout, is_column = engine.layout, name == "linear_fc1"
    tp = layout.tp_rank, layout.tp_size
    x, weight, gradient = given(name)
    # Tokens of a context rank; then what a tensor rank holds of the input and of the output.
    x, gradient = (part(one, layout.cp_rank, layout.cp_size, 0) for one in (x, gradient))
    cut_weight = 0 if is_column else 1
    by_tokens = 0 if layout.parallel.sequence else None
    cut_input, cut_output = (by_tokens, 1) if is_column else (1, by_tokens)
    # The products of a row linear see the gradient of all its tokens.
    product_gradient = part(gradient, *tp, 1 if is_column else None)
    x, gradient = part(x, *tp, cut_input), part(gradient, *tp, cut_output)
    with torch.no_grad():
        linear.weight.copy_(part(weight, *tp, cut_weight))
    linear.weight.main_grad.zero_()
    x.requires_grad_()
    with engine.patches:
        output, _ = linear(x.unsqueeze(1))
        output.backward(gradient.unsqueeze(1))
        forward, backward = linear.weight_casts()
        scales = {"weight": forward.inverse, "weight transposed": backward.inverse}
        for of, casts in (
            ("input", linear.cast_input(x.detach())),
            ("gradient", linear.cast_gradient(product_gradient)),
        ):
            scales |= {of: casts[0].inverse, f"{of} transposed": casts[1].inverse}
    if layout.cp_size > 1:
        cut_input = cut_output = 0
    return {
        "output": (output.detach().squeeze(1), cut_output),
        "input_gradient": (x.grad, cut_input),
        "weight_gradient": (linear.weight.main_grad.clone(), cut_weight),
        "scales": scales,
        "counts": (linear.counts.products, linear.counts.weight_casts),
    }


def part(whole: torch.Tensor, rank: int, size: int, dim: int | None) -> torch.Tensor:
    return whole.clone() if dim is None else whole.chunk(size, dim)[rank].clone()


def whole_of(parts: list[dict], *, adds_weights: bool) -> Found:
    """Over ranks of tp or of cp; context ranks add weight gradients."""

    def joined(name: str) -> torch.Tensor:
        tensors, dim = [one[name][0] for one in parts], parts[0][name][1]
        return tensors[0] if dim is None else torch.cat(tensors, dim)

    gradients = [one["weight_gradient"][0] for one in parts]
    weight = sum(gradients) if adds_weights else joined("weight_gradient")
    scales = [one["scales"] for one in parts]
    return Found(joined("output"), joined("input_gradient"), weight, scales)


def found_on(
    pool: RankPool, name: str, *overrides: str, in_rank: Callable[..., dict | None] = run
) -> Found:
    parts = [one for one in pool.run(in_rank, name, overrides) if one is not None]
    assert all(one["counts"] == (3, 1) for one in parts)
    return whole_of(parts, adds_weights="parallel.context=2" in overrides)


def own_part(whole: torch.Tensor, shape: torch.Size, rank: int) -> torch.Tensor:
    """Of two ranks that split a matrix; its scales are split with it, or shared."""
    for dim, (size, own) in enumerate(zip(whole.shape, shape, strict=True)):
        if size != own:
            assert size == 2 * own
            whole = whole.chunk(2, dim)[rank]
    return whole


def check_like_one_process(split: Found, alone: Found) -> None:
    """Every scale bit for bit, the products' sums but for their order."""
    for got, expected in zip(split[:3], alone[:3], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    [whole] = alone.scales
    for rank, scales in enumerate(split.scales):
        for key, found in scales.items():
            assert torch.equal(found, own_part(whole[key], found.shape, rank)), (rank, key)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", WIDTHS)
def test_linear_multiplies_the_cast_values(pool: RankPool, name: str, scaling: str) -> None:
    found = found_on(pool, name, f"precision.fp8_recipe={scaling}")
    x, weight, gradient = given(name)
    dtype = SCALINGS[scaling].gradient_dtype

    def values(matrix: torch.Tensor, dtype=E4M3, is_weight=False) -> torch.Tensor:
        shared = SCALINGS[scaling].shared(matrix.shape, is_weight=is_weight)
        return cast(matrix, dtype, shared).values()

    expected = (
        values(x) @ values(weight, is_weight=True).t(),
        values(gradient, dtype) @ values(weight.t(), is_weight=True).t(),
        values(gradient.t(), dtype) @ values(x.t()).t(),
    )
    exact = (x @ weight.t(), gradient @ weight, gradient.t() @ x)
    for got, of_values, of_inputs in zip(found[:3], expected, exact, strict=True):
        torch.testing.assert_close(got, of_values, rtol=1e-5, atol=1e-6)
        error = (got - of_inputs).norm() / of_inputs.norm()
        # 3 bits of the values, 2 of the gradients: and yet not what fp32 would give.
        assert 1e-3 < error < 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise", "blockwise"])
@pytest.mark.parametrize("name", WIDTHS)
def test_every_layout_has_the_scales_of_one_process(
    pool: RankPool, name: str, scaling: str, layout: str
) -> None:
    recipe = f"precision.fp8_recipe={scaling}"
    alone = found_on(pool, name, recipe)
    check_like_one_process(found_on(pool, name, recipe, *LAYOUTS[layout]), alone)
