"""`phi4 dpo`: what a preference stage needs before it trains."""

from pathlib import Path
from typing import Annotated

import typer

from phi4.config import check, load_recipe
from phi4.errors import ConfigError
from phi4.launch import WorkerEnvironment, join, on_ranks

app = typer.Typer(no_args_is_help=True)

RecipePath = Annotated[Path, typer.Argument(help="A .toml recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, for example parallel.tensor=2.")
]


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""


@app.command("cache-ref")
def cache_ref(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the cache of another model or of other pairs."),
    ] = False,
    chunk_rows: Annotated[
        int, typer.Option(min=1, help="Rows per file while the cache is computed.")
    ] = 64,
) -> None:
    """Compute the reference model's log-probabilities of every pair, into data.reference_cache.

    The model is dpo.reference, or run.init_from. The layout is the recipe's; the cache can be used
    by any layout. The same command resumes an interrupted job and skips a finished cache of the
    same model and pairs.

    Exit codes: those of `phi4 train`.
    """
    overrides = overrides or []
    recipe = load_recipe(recipe_path, overrides)
    if recipe.data.reference_cache is None:
        raise ConfigError(
            "data.reference_cache is not set; name the directory that the cache is written to"
        )
    check(recipe)
    argv = ["dpo", "cache-ref", str(recipe_path), *overrides, "--chunk-rows", str(chunk_rows)]

    def body(worker: WorkerEnvironment) -> None:
        from phi4.engine.platform import disconnect
        from phi4.stages.reference import cache_references

        check(recipe, worker.world_size)
        platform = join(worker, recipe.run.platform, recipe.run.threads)
        cache_references(recipe, platform, overwrite=overwrite, chunk_rows=chunk_rows)
        disconnect()

    code = on_ranks(
        [*argv, *(["--overwrite"] if overwrite else [])],
        body,
        num_workers=recipe.parallel.model_parallel_size * max(recipe.parallel.data, 1),
        work_dir=Path(recipe.data.reference_cache),
    )
    raise typer.Exit(code)
