"""`phi4 verify preempt` and `phi4 verify kills`: runs with injected faults."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from phi4.config import Recipe, check, load_recipe, with_overrides
from phi4.errors import ConfigError
from phi4.stages import require_stage

if TYPE_CHECKING:
    from phi4.verify.drills.drill import Fault, FaultOutcome

DEFAULT_RECIPE = Path("examples/recipes/tiny_pretrain.toml")
RecipePath = Annotated[Path, typer.Argument(help="A .toml recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value.")]
Seed = Annotated[int, typer.Option(help="Seed of the times and targets.")]
WorkDir = Annotated[
    Path | None, typer.Option(help="Directory of all runs; by default a temporary one.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to `phi4 verify`."""
    app.command("preempt")(preempt)
    app.command("kills")(kills)


def preempt(
    recipe_path: RecipePath = DEFAULT_RECIPE,
    overrides: Overrides = None,
    signals: Annotated[int, typer.Option(min=1, help="Number of signals to send.")] = 6,
    seed: Seed = 0,
    work_dir: WorkDir = None,
) -> None:
    """Send SIGTERM or SIGUSR1 at random times and resume each time. Exit 1 on a failure.

    The launcher, one rank or all processes get the signal, during start-up, steps, evaluations and
    saves. Each run must end with code 5 and one checkpoint of its step; each finished run must be
    bit-identical to an undisturbed one.
    """
    from phi4.verify.drills.faults import Notice

    recipe = _checked(load_recipe(recipe_path, overrides or []))
    work_dir = work_dir or Path(mkdtemp(prefix="phi4-preempt-"))
    outcomes = _drilled(recipe, work_dir, Notice(), signals, seed)
    if outcomes is None:
        typer.echo(f"preempt: FAILED, see {work_dir}")
        raise typer.Exit(1)
    saved = sum(outcome.has_saved for outcome in outcomes)
    typer.echo(
        f"preempt: {signals} notices: {saved} with one save each, {signals - saved} before a step "
        "with nothing to save"
    )


def kills(
    recipe_path: RecipePath = DEFAULT_RECIPE,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=1, help="Number of kills over all layouts.")] = 6,
    layouts: Annotated[
        str, typer.Option(help="Comma-separated layouts of `phi4 verify parity`.")
    ] = "pp2,tp2xpp2+sp",
    seed: Seed = 0,
    work_dir: WorkDir = None,
) -> None:
    """Send SIGKILL to a random rank at random times and resume each time. Exit 1 on a failure.

    Each finished run must have the losses and the data of an undisturbed one.
    """
    from phi4.verify.drills.faults import Kill
    from phi4.verify.layouts import LAYOUTS, names_of, reference_case

    recipe = load_recipe(recipe_path, overrides or [])
    names = names_of(layouts, tuple(LAYOUTS))
    one = reference_case(recipe).recipe
    recipes = [_checked(with_overrides(one, LAYOUTS[name])) for name in names]
    if alone := [name for name, case in zip(names, recipes, strict=True) if _size(case) < 2]:
        raise ConfigError(
            f"--layouts {','.join(alone)} has one process, so no rank can be killed alone; use pp2"
        )
    work_dir = work_dir or Path(mkdtemp(prefix="phi4-kills-"))
    shares = [kills // len(names) + (n < kills % len(names)) for n in range(len(names))]
    results = [
        _drilled(layout, work_dir / name, Kill(), share, seed)
        for name, layout, share in zip(names, recipes, shares, strict=True)
        if share
    ]
    has_failed = any(outcomes is None for outcomes in results)
    verdict = f"FAILED, see {work_dir}" if has_failed else "resumed, losses and data stream equal"
    typer.echo(f"kills: {kills} over {', '.join(names)}: {verdict}")
    raise typer.Exit(1 if has_failed else 0)


def _checked(recipe: Recipe) -> Recipe:
    require_stage(recipe)
    check(recipe)
    return recipe


def _size(recipe: Recipe) -> int:
    """Processes of the recipe."""
    return recipe.parallel.model_parallel_size * max(recipe.parallel.data, 1)


def _drilled(
    recipe: Recipe, work_dir: Path, fault: "Fault", num_faults: int, seed: int
) -> "Sequence[FaultOutcome] | None":
    """Inject the faults and print the outcomes; None if one of them is wrong."""
    from phi4.verify.drills.drill import Drill

    work_dir.mkdir(parents=True, exist_ok=True)
    outcomes, differing = Drill(recipe, work_dir, Random(seed), typer.echo).run(fault, num_faults)
    _print(outcomes, work_dir.name)
    for line in differing:
        typer.echo(line)
    return None if differing or any(outcome.wrong for outcome in outcomes) else outcomes


def _print(outcomes: "Sequence[FaultOutcome]", title: str) -> None:
    table = Table(title=title)
    for column in ("", "fault", "during", "exit code", "seconds", "newest checkpoint", ""):
        table.add_column(column)
    for number, outcome in enumerate(outcomes, start=1):
        table.add_row(
            str(number),
            outcome.what,
            outcome.phase,
            str(outcome.exit_code),
            f"{outcome.seconds:.1f}",
            str(outcome.step or "none"),
            outcome.wrong or "ok",
        )
    Console(width=120).print(table)
