"""Check a recipe against named rules; all violations are reported before any process starts.

A rule takes the recipe and yields one line per violation: the value given, the constraint, and the
remedy.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from phi4.config.fp8_rules import fp8
from phi4.config.schema import Recipe
from phi4.config.te_rules import transformer_engine
from phi4.errors import LayoutError

Rule = Callable[[Recipe], Iterator[str]]


def check(recipe: Recipe, world_size: int | None = None, stage_rules: Sequence[Rule] = ()) -> None:
    """Raise an error for a recipe that breaks any rule.

    Args:
        recipe: the resolved recipe.
        world_size: processes that were started, or None when they are still to be started.
        stage_rules: further rules of the stage.

    Raises:
        LayoutError: one line per violated rule.
    """
    found = violations(recipe, world_size)
    found += [line for rule in stage_rules for line in rule(recipe)]
    if found:
        raise LayoutError("\n".join(found))


def violations(recipe: Recipe, world_size: int | None = None) -> list[str]:
    """Return every violated rule as one line; the list is empty for a valid recipe."""
    found = [line for rule in RULES for line in rule(recipe)]
    if world_size is not None:
        found += _world(recipe, world_size)
    return found


def data_parallel_size(recipe: Recipe, world_size: int | None) -> int:
    """Return the number of data-parallel replicas; `parallel.data = 0` means all remaining
    processes."""
    if recipe.parallel.data:
        return recipe.parallel.data
    return max(1, (world_size or 0) // recipe.parallel.model_parallel_size)


def _heads(recipe: Recipe) -> Iterator[str]:
    m = recipe.model
    if m.hidden_size % m.num_attention_heads:
        yield (
            f"model.num_attention_heads={m.num_attention_heads} does not divide "
            f"model.hidden_size={m.hidden_size}; use a divisor"
        )
    elif m.head_dim % 2:
        yield f"head dim {m.head_dim} is odd; RoPE rotates halves, so it must be even"
    if m.num_attention_heads % m.num_key_value_heads:
        yield (
            f"model.num_key_value_heads={m.num_key_value_heads} does not divide "
            f"model.num_attention_heads={m.num_attention_heads}; use a divisor"
        )


def _tensor(recipe: Recipe) -> Iterator[str]:
    m, tensor = recipe.model, recipe.parallel.tensor
    split = ("num_key_value_heads", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = {key: getattr(m, key) for key in split}
    wrong = [f"{key}={size}" for key, size in sizes.items() if size % tensor]
    if wrong:
        common = math.gcd(*sizes.values())
        fitting = [degree for degree in range(1, common + 1) if common % degree == 0]
        yield (
            f"parallel.tensor={tensor} does not divide {' nor '.join(wrong)}; "
            f"use {_listed(fitting)} (a KV head is not replicated, the vocabulary is not padded)"
        )


def _sequence(recipe: Recipe) -> Iterator[str]:
    p, length = recipe.parallel, recipe.data.sequence_length
    if length > recipe.model.max_position_embeddings:
        yield (
            f"data.sequence_length={length} exceeds model.max_position_embeddings="
            f"{recipe.model.max_position_embeddings}; raise the latter or shorten the rows"
        )
    if length % recipe.data.unit_tokens:
        yield (
            f"data.sequence_length={length} is not a multiple of data.unit_tokens="
            f"{recipe.data.unit_tokens}; a row is an integer number of units"
        )
    if p.sequence and p.tensor == 1:
        yield "parallel.sequence=true needs parallel.tensor > 1; there is nothing to split over"
    pieces = (2 * p.context if p.context > 1 else 1) * (p.tensor if p.sequence else 1)
    if length % pieces:
        yield (
            f"data.sequence_length={length} does not split over context={p.context} (two chunks "
            f"per rank) and sequence-parallel tensor={p.tensor}; use a multiple of {pieces}"
        )


def _pipeline(recipe: Recipe) -> Iterator[str]:
    p, layers = recipe.parallel, recipe.model.num_layers
    stages = p.pipeline * p.virtual_pipeline
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        yield "parallel.virtual_pipeline > 1 needs parallel.pipeline > 1"
    if p.virtual_pipeline > 1 and p.pipeline == 2 and not p.overlap_p2p:
        yield (
            "parallel.virtual_pipeline > 1 on parallel.pipeline=2 needs parallel.overlap_p2p=true: "
            "megatron-core's batched sends between the same two ranks are matched in issue order "
            "and the loss is silently wrong"
        )
    if p.overlap_p2p and p.virtual_pipeline == 1:
        yield (
            "parallel.overlap_p2p=true needs parallel.virtual_pipeline > 1; "
            "plain 1F1B has no overlapped sends"
        )
    if p.layers_per_stage is None:
        if layers % stages:
            yield (
                f"pipeline={p.pipeline} x virtual_pipeline={p.virtual_pipeline} does not divide "
                f"model.num_layers={layers}; use a divisor or set parallel.layers_per_stage"
            )
        return
    if len(p.layers_per_stage) != stages:
        yield (
            f"parallel.layers_per_stage has {len(p.layers_per_stage)} entries; pipeline="
            f"{p.pipeline} x virtual_pipeline={p.virtual_pipeline} needs {stages}"
        )
    if sum(p.layers_per_stage) != layers:
        yield (
            f"parallel.layers_per_stage sums to {sum(p.layers_per_stage)}; "
            f"model.num_layers is {layers}"
        )


def _batch(recipe: Recipe) -> Iterator[str]:
    # A batch that does not fit one replica fits no number of replicas.
    yield from _microbatches(recipe, recipe.parallel.data or 1)


def _microbatches(recipe: Recipe, data: int) -> Iterator[str]:
    b, p = recipe.batch, recipe.parallel
    num_microbatches, rest = divmod(b.global_batch_size, b.micro_batch_size * data)
    if rest:
        yield (
            f"batch.global_batch_size={b.global_batch_size} is not a multiple of micro_batch_size="
            f"{b.micro_batch_size} x data={data}; every rank runs complete micro-batches"
        )
    # Interleaved 1F1B runs micro-batches in groups as large as the pipeline.
    elif p.virtual_pipeline > 1 and num_microbatches % p.pipeline:
        yield (
            f"interleaved pipeline needs the {num_microbatches} micro-batches per rank to be a "
            f"multiple of parallel.pipeline={p.pipeline}; change batch.global_batch_size or "
            "batch.micro_batch_size"
        )


def _schedule(recipe: Recipe) -> Iterator[str]:
    o = recipe.optim
    if o.min_learning_rate > o.learning_rate:
        yield (
            f"optim.min_learning_rate={o.min_learning_rate} exceeds "
            f"optim.learning_rate={o.learning_rate}"
        )
    if o.decay and o.warmup >= o.decay:
        yield f"optim.warmup={o.warmup} must end before optim.decay={o.decay}"
    if recipe.parallel.overlap_param_gather and not (
        recipe.parallel.distributed_optimizer and recipe.parallel.overlap_grad_reduce
    ):
        yield (
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true"
        )


def _sources(recipe: Recipe) -> Iterator[str]:
    for key in ("sources", "held_out"):
        names = [source.name for source in getattr(recipe.data, key)]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"data.{key} names {name!r} twice; every source needs its own name"
    weights = [source.weight for source in recipe.data.sources]
    if weights and not any(weights):
        yield "data.sources: all weights are 0; nothing would be drawn"
    if any(0 < weight < 1 for weight in weights) and not math.isclose(math.fsum(weights), 1):
        yield (
            f"data.sources: weights below 1 are fractions, and they sum to {math.fsum(weights):g}; "
            "make them sum to 1, or give ratios from 1 up"
        )
    for source in (*recipe.data.sources, *recipe.data.held_out):
        selects = source.min_tokens or source.max_tokens or source.overlong in ("truncate", "drop")
        if source.kind == "stream" and selects:
            yield (
                f"source {source.name!r} selects documents by min_tokens, max_tokens or overlong, "
                'but a stream is cut regardless of document boundaries; set kind="windows"'
            )
        if source.kind in ("pairs", "pivots") and (selects or source.overlong):
            yield (
                f"source {source.name!r} selects documents by min_tokens, max_tokens or overlong, "
                f"which has no effect on {source.kind}; select rows with `phi4 data pairs`"
            )
        if source.max_response_tokens and source.kind != "pairs":
            yield (
                f"source {source.name!r}: max_response_tokens={source.max_response_tokens} has no "
                f'effect on kind={source.kind}; remove it, or use kind="pairs"'
            )
        if 0 < source.max_tokens < source.min_tokens:
            yield (
                f"source {source.name!r}: min_tokens={source.min_tokens} exceeds "
                f"max_tokens={source.max_tokens}; no document would remain"
            )


def _world(recipe: Recipe, world_size: int) -> Iterator[str]:
    p = recipe.parallel
    if p.data and world_size != p.model_parallel_size * p.data:
        yield (
            f"{world_size} processes were started; tensor={p.tensor} x pipeline={p.pipeline} x "
            f"context={p.context} x data={p.data} needs {p.model_parallel_size * p.data}"
        )
    if not p.data:
        if world_size % p.model_parallel_size:
            yield (
                f"{world_size} processes were started; not a multiple of tensor={p.tensor} x "
                f"pipeline={p.pipeline} x context={p.context} = {p.model_parallel_size}"
            )
        else:
            yield from _microbatches(recipe, world_size // p.model_parallel_size)


def _skip_windows(recipe: Recipe) -> Iterator[str]:
    steps = [step for step, _ in recipe.data.skip_windows]
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        begins = ", ".join(map(str, steps))
        yield (
            f"data.skip_windows has the steps {begins}, which do not ascend; give each step once, "
            f"in ascending order"
        )


def _replica(recipe: Recipe) -> Iterator[str]:
    replica_dir, run_dir = recipe.checkpoint.replica_dir, recipe.run.dir
    if replica_dir and Path(replica_dir).resolve().is_relative_to(Path(run_dir).resolve()):
        yield (
            f"checkpoint.replica_dir={replica_dir} is inside run.dir={run_dir} and would be lost "
            f"with it; use a directory on another file system, such as a host's local disk"
        )


def _listed(values: list[int]) -> str:
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last


RULES: tuple[Rule, ...] = (
    _heads,
    _tensor,
    _sequence,
    _pipeline,
    _batch,
    _schedule,
    _sources,
    _skip_windows,
    _replica,
    fp8,
    transformer_engine,
)
