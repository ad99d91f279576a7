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
