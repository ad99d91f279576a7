"""Recipe rules for FP8: matrix sizes that the products support, and which layers use it."""

from collections.abc import Iterator

from phi4.config.schema import Recipe

FP8_BLOCK = 128
"""Side length of a block that shares a scale."""

_MULTIPLE = {"tensorwise": 16, "rowwise": 16, "blockwise": FP8_BLOCK, "delayed": 16}
"""Required divisor of every dimension of a product on this rank: of a GPU's FP8 product, or the
block size."""


def fp8(recipe: Recipe) -> Iterator[str]:
    """Return every violated rule as one line."""
    yield from _param_gather(recipe)
    precision = recipe.precision
    if precision.fp8 == "off":
        return
    ends, layers = precision.fp8_end_layers_in_bf16, recipe.model.num_layers
    if 2 * ends >= layers:
        yield (
            f"precision.fp8_end_layers_in_bf16={ends} at both ends leaves none of "
            f"model.num_layers={layers} for FP8; lower it or use precision.fp8=off"
        )
    multiple = _MULTIPLE[precision.fp8_recipe]
    wrong = [f"{name} {size}" for name, size in _sizes(recipe).items() if size % multiple]
    if wrong:
        yield (
            f"precision.fp8_recipe={precision.fp8_recipe} requires matrix sizes per rank that are "
            f"multiples of {multiple}; got {', '.join(wrong)}; change the model, "
            f"batch.micro_batch_size or the layout, or use precision.fp8=off"
        )


def _param_gather(recipe: Recipe) -> Iterator[str]:
    parallel, precision = recipe.parallel, recipe.precision
    if not parallel.fp8_param_gather:
        return
    off = "or parallel.fp8_param_gather=false"
    if not parallel.distributed_optimizer:
        yield (
            "parallel.fp8_param_gather=true needs weights that are gathered, but "
            f"parallel.distributed_optimizer=false; use parallel.distributed_optimizer=true, {off}"
        )
    if precision.fp8 != "torch":
        yield (
            "parallel.fp8_param_gather=true needs linears that cast bf16 weights to FP8 in torch, "
            f"but precision.fp8={precision.fp8}; use precision.fp8=torch, {off}"
        )
    elif precision.fp8_recipe != "tensorwise":
        # A weight is cast twice by other scales: for the forward product and for the gradient.
        yield (
            "parallel.fp8_param_gather=true needs one scale per weight, but "
            f"precision.fp8_recipe={precision.fp8_recipe}; use precision.fp8_recipe=tensorwise, "
            f"{off}"
        )
    if precision.dtype != "bf16":
        # In fp32 the gathered weights are the masters themselves, which FP8 would round.
        yield (
            "parallel.fp8_param_gather=true needs masters apart from the weights, but "
            f"precision.dtype={precision.dtype}; use precision.dtype=bf16, {off}"
        )


def fp8_layers(recipe: Recipe) -> range:
    """Return the 0-based global indices of the layers whose linears multiply in FP8."""
    if recipe.precision.fp8 == "off":
        return range(0)
    ends = recipe.precision.fp8_end_layers_in_bf16
    return range(ends, recipe.model.num_layers - ends)


def _sizes(recipe: Recipe) -> dict[str, int]:
    """Return the sizes of the products' matrices on a rank, by what each dimension counts."""
    model, parallel = recipe.model, recipe.parallel
    tokens = recipe.batch.micro_batch_size * recipe.data.sequence_length // parallel.context
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    return {
        "model.hidden_size": model.hidden_size,
        "columns of queries, keys and values": heads * model.head_dim // parallel.tensor,
        "columns of attention": model.num_attention_heads * model.head_dim // parallel.tensor,
        "columns of the MLP": model.intermediate_size // parallel.tensor,
        "tokens of a micro-batch": tokens // (parallel.tensor if parallel.sequence else 1),
    }
