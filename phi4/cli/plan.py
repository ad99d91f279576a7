"""`phi4 plan`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from phi4.cli.tables import table_console
from phi4.config import load_recipe
from phi4.engine.precision import describe_precision
from phi4.model.shape import format_bytes, training_flops_per_token
from phi4.plan import MemoryPlan, StageMemory, card_named, check_fit, make_plan, recompute_mistake
from phi4.plan.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    NCCL_GROUP_BYTES,
    optimizer_bytes_per_parameter,
)

CardName = Literal["h100", "h200", "a100"]

COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "loss_head",
    "working",
    "batch",
    "allowance",
    "total",
)
"""Fields of StageMemory, in the order of the table."""


def plan(
    recipe_path: Annotated[Path, typer.Argument(help="A .toml recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    gpu: Annotated[CardName, typer.Option(help="Model of the GPUs.")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node.")] = 8,
    host_memory: Annotated[int, typer.Option(min=1, help="Host memory per node in GiB.")] = 2048,
) -> None:
    """Predict the memory per GPU of a recipe, before it runs.

    The table shows the peak of every pipeline stage. Exit code 2 if one of them exceeds the GPU's
    memory. No GPU is needed: parameters are counted on the real model on the meta device.
    """
    recipe = load_recipe(recipe_path, overrides or [])
    planned = make_plan(recipe, gpus, card_named(gpu), gpus_per_node)
    console = table_console(150)
    console.print(_stages(planned))
    console.print(_figures(planned, host_memory * 2**30))
    mistake = recompute_mistake(planned)
    if mistake:
        typer.echo(f"mistake: {mistake}\n")
    check_fit(planned)


def _stages(planned: MemoryPlan) -> Table:
    card = planned.card
    table = Table(
        title=f"GiB per GPU at the peak, on {planned.num_gpus:,} x {card.title} "
        f"({format_bytes(card.capacity_bytes)} each)",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    for heading in ("stage", "layers", "in flight", "parameters", *COLUMNS, "of card"):
        table.add_column(heading.replace("_", " "), justify="right")
    for stage in planned.stages:
        table.add_row(*_row(stage, card.capacity_bytes))
    return table


def _row(stage: StageMemory, capacity_bytes: int) -> list[str]:
    share = stage.total / capacity_bytes
    return [
        str(stage.pp_rank),
        "+".join(map(str, stage.layers)),
        "+".join(map(str, stage.in_flight)),
        f"{stage.num_parameters:,}",
        *(f"{getattr(stage, column) / 2**30:.2f}" for column in COLUMNS),
        f"{share:.0%}" if share <= 1 else f"[red]{share:.0%}[/red]",
    ]


def _figures(planned: MemoryPlan, host_bytes: int) -> Table:
    recipe, card = planned.recipe, planned.card
    parallel = recipe.parallel
    flops = training_flops_per_token(recipe.model, recipe.data.sequence_length)
    tokens = planned.step_tokens
    table = Table("figure", "value", title="The run", title_justify="left", box=SIMPLE_HEAD)
    table.add_row("parameters, each counted once", f"{planned.num_parameters:,}")
    table.add_row(
        "layout",
        f"tensor {parallel.tensor}{' + sequence' * parallel.sequence}, pipeline "
        f"{parallel.pipeline} x {parallel.virtual_pipeline}, context {parallel.context}, "
        f"data {parallel.data}; recompute {recipe.recompute.granularity}",
    )
    table.add_row("precision", describe_precision(recipe))
    table.add_row("optimizer state", _optimizer(planned))
    if parallel.fp8_param_gather:
        table.add_row("FP8 weight gather", _gather(planned))
    table.add_row(
        "tokens per step",
        f"{tokens:,} = {recipe.batch.global_batch_size:,} rows x "
        f"{recipe.data.sequence_length:,}; {planned.num_microbatches:,} micro-batches of "
        f"{recipe.batch.micro_batch_size} per data rank",
    )
    table.add_row("steps", f"{recipe.run.steps:,}, {recipe.run.steps * tokens:,} tokens")
    if recipe.run.stage == "dpo":
        table.add_row(
            "pairs",
            "two sequences of one row each; all pivots of a trajectory share one",
        )
        table.add_row(
            "reference model",
            "0 B: its log-probabilities are cached, 16 B of host memory per pair "
            "(phi4 dpo cache-ref)",
        )
    table.add_row(
        "FLOPs per token", f"{flops.causal:,} causal; {flops.full:,} with the full square"
    )
    table.add_row("card", f"bf16 dense peak {card.bf16_dense_tflops} TFLOP/s; {card.source}")
    table.add_row("host memory of a full save", _save(planned, host_bytes))
    table.add_row(
        "allowance (chosen, not measured)",
        f"{format_bytes(CONTEXT_BYTES)} CUDA context, {format_bytes(NCCL_GROUP_BYTES)} per NCCL "
        f"group, {FRAGMENTATION:.0%} of activations and working memory",
    )
    return table


def _optimizer(planned: MemoryPlan) -> str:
    recipe = planned.recipe
    parallel, largest = recipe.parallel, planned.largest_stage_parameters
    split, plain = (
        format_bytes(largest * optimizer_bytes_per_parameter(recipe, distributed=distributed))
        for distributed in (True, False)
    )
    used = "distributed" if parallel.distributed_optimizer else "plain"
    return (
        f"{used}; on the largest stage {split} distributed over {parallel.data * parallel.context} "
        f"data and context ranks, {plain} plain"
    )


def _gather(planned: MemoryPlan) -> str:
    largest = max((stage.gather for stage in planned.stages), key=lambda one: one.plain_bytes)
    messages = max(stage.gather.message_bytes for stage in planned.stages)
    return (
        f"{format_bytes(largest.received_bytes)} received per step on the largest stage, "
        f"{format_bytes(largest.plain_bytes)} without; messages take at most "
        f"{format_bytes(messages)}, before the first micro-batch"
    )


def _save(planned: MemoryPlan, host_bytes: int) -> str:
    checkpoint = planned.recipe.checkpoint
    gathered = planned.gather_bytes
    if not gathered:
        return "nothing is gathered without the distributed optimizer; auto takes full"
    needed = gathered / checkpoint.host_memory_share
    routine, every = planned.save_format(host_bytes), checkpoint.reshardable_every
    if routine == "dp" and every:
        routine += f", full every {every:,} steps"
    return (
        f"{format_bytes(gathered)} gathered per machine; auto takes full from "
        f"{format_bytes(needed)} on, so {routine} on {format_bytes(host_bytes)}"
    )
