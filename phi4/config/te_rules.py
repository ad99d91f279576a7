"""Recipe rules for FP8 by Transformer Engine, and the stages that do not use it."""

from collections.abc import Iterator

from phi4.config.schema import Recipe


def transformer_engine(recipe: Recipe) -> Iterator[str]:
    """Return every violated rule as one line."""
    precision = recipe.precision
    if precision.fp8 == "torch" and precision.fp8_recipe == "delayed":
        yield (
            "precision.fp8_recipe=delayed is only available in Transformer Engine; use "
            "precision.fp8=te, or precision.fp8_recipe=tensorwise"
        )
    if precision.fp8 != "te":
        return
    if precision.fp8_recipe == "rowwise":
        yield (
            "precision.fp8_recipe=rowwise is not supported by Transformer Engine; use tensorwise, "
            "blockwise or delayed, or precision.fp8=torch"
        )
    if precision.dtype != "bf16":
        yield (
            f"precision.fp8=te needs bf16 inputs and outputs, but "
            f"precision.dtype={precision.dtype}; use precision.dtype=bf16, or precision.fp8=torch"
        )
    if recipe.run.platform == "cpu":
        yield (
            "precision.fp8=te needs a GPU, but run.platform=cpu; use precision.fp8=torch, which "
            "also runs on a CPU"
        )
    if precision.fp8_recipe == "delayed" and recipe.recompute.granularity == "full":
        # Each recomputed layer would end a context and shift every amax history.
        yield (
            "precision.fp8_recipe=delayed cannot be used with recompute.granularity=full; use "
            "recompute.granularity=selective, or precision.fp8_recipe=tensorwise"
        )
    yield from _end_layers(recipe)


def _end_layers(recipe: Recipe) -> Iterator[str]:
    ends = recipe.precision.fp8_end_layers_in_bf16
    per_stage = recipe.model.num_layers // recipe.parallel.pipeline
    if ends and recipe.precision.fp8_recipe == "delayed":
        # Transformer Engine reduces its amax histories when the layers' common context ends.
        yield (
            f"precision.fp8_recipe=delayed applies to all layers, but "
            f"precision.fp8_end_layers_in_bf16={ends}; use precision.fp8_end_layers_in_bf16=0, or "
            "precision.fp8_recipe=tensorwise"
        )
    if ends > per_stage:
        yield (
            f"precision.fp8_end_layers_in_bf16={ends} with precision.fp8=te exceeds "
            f"model.num_layers / parallel.pipeline = {per_stage}; lower it or parallel.pipeline"
        )


def without_transformer_engine(recipe: Recipe) -> Recipe:
    """Return the recipe without Transformer Engine, for engines that do not train; weights stay
    bf16.

    Generating, exporting, scoring and planning therefore need no GPU.
    """
    if recipe.precision.fp8 != "te":
        return recipe
    precision = recipe.precision.model_copy(update={"fp8": "off"})
    return recipe.model_copy(update={"precision": precision})
