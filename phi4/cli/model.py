"""`phi4 model`: the model of a recipe on paper, before anything is built."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from phi4.config import ModelConfig, Recipe, check, load_recipe, with_overrides
from phi4.model import shape

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""


@app.command()
def info(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [OVERRIDES]...",
            help="A TOML recipe (by default Phi-4 itself), then section.key=value overrides.",
        ),
    ] = None,
) -> None:
    """Print the shape of a model, exact parameters, FLOPs per token and KV cache bytes."""
    recipe = _recipe(arguments or [])
    check(recipe)
    console = Console()
    console.print(_tensors(recipe.model))
    console.print(_figures(recipe.model, recipe.data.sequence_length))


def _recipe(arguments: list[str]) -> Recipe:
    if arguments and "=" not in arguments[0]:
        return load_recipe(arguments[0], arguments[1:])
    return with_overrides(Recipe(), arguments)


def _tensors(model: ModelConfig) -> Table:
    table = Table("tensor", "shape", title="Parameters", title_justify="left")
    for heading in ("count", "parameters"):
        table.add_column(heading, justify="right")
    for kind in shape.tensor_kinds(model):
        count = model.num_layers if kind.per_layer else 1
        size = " x ".join(map(str, kind.shape))
        table.add_row(kind.role, size, str(count), f"{count * kind.num_parameters:,}")
    table.add_section()
    table.add_row("one layer", "", "", f"{shape.num_layer_parameters(model):,}")
    table.add_row("in matmuls", "", "", f"{shape.num_matmul_parameters(model):,}")
    table.add_row("total", "", "", f"{shape.num_parameters(model):,}", style="bold")
    return table


def _figures(model: ModelConfig, sequence_length: int) -> Table:
    flops = shape.training_flops_per_token(model, sequence_length)
    cache = shape.kv_cache_bytes_per_token(model)
    whole_cache = shape.format_bytes(cache * model.max_position_embeddings)
    weights = shape.weight_bytes(model, "bf16")
    state = shape.num_parameters(model) * shape.training_bytes_per_parameter("bf16")
    table = Table("figure", "value", title="Per token and in bytes", title_justify="left")
    heads = f"{model.num_attention_heads} query, {model.num_key_value_heads} key-value"
    table.add_row("heads", f"{heads}, {model.head_dim} wide")
    table.add_row("RoPE base", f"{model.rope_theta:,.10g}")
    table.add_row(
        f"training FLOPs/token at {sequence_length:,} tokens, causal",
        f"{flops.causal:,} ({flops.matmul:,} matmul + {flops.attention_causal:,} attention)",
    )
    table.add_row("the same, full attention square", f"{flops.full:,}")
    table.add_row("6N", f"{flops.six_n:,}")
    table.add_row(
        "KV cache, bf16",
        f"{cache:,} B/token, {whole_cache} at {model.max_position_embeddings:,} tokens",
    )
    table.add_row("weights, bf16", f"{weights:,} B ({shape.format_bytes(weights)})")
    table.add_row("training state, bf16, unsharded", f"{state:,} B ({shape.format_bytes(state)})")
    return table
