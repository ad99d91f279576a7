"""`phi4 verify`: checks of layouts and resumption on the user's machine."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from phi4.cli import verify_drills, verify_leak
from phi4.cli.file_errors import FileErrorsGroup
from phi4.cli.tables import table_console
from phi4.config import Recipe, check, dump_toml, load_recipe
from phi4.launch import WorkerEnvironment, on_ranks
from phi4.stages import require_stage, stage_of

if TYPE_CHECKING:
    from phi4.verify.layouts import LayoutCase
    from phi4.verify.parity import Comparison

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)
verify_leak.register(app)
verify_drills.register(app)

DEFAULT_RECIPE = Path("examples/recipes/tiny_pretrain.toml")
RecipePath = Annotated[Path, typer.Argument(help="A .toml recipe.")]
Results = list[tuple["LayoutCase", "Comparison"]]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value.")]


@app.command()
def parity(
    recipe_path: RecipePath = DEFAULT_RECIPE,
    overrides: Overrides = None,
    layouts: Annotated[str, typer.Option(help="Comma-separated layouts; by default all.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 10,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Append the result as a row to this file.")
    ] = None,
    work_dir: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare every layout with one process: losses, norms, parameters. Exit 1 beyond tolerance."""
    from phi4.verify.layouts import LAYOUTS, cases, names_of, reference_case
    from phi4.verify.parity import compare

    recipe = load_recipe(recipe_path, overrides or [])
    reference = reference_case(recipe)
    require_stage(recipe)
    check(reference.recipe)
    possible, impossible = cases(recipe, names_of(layouts, tuple(LAYOUTS)))
    started_here = work_dir is None
    work_dir = work_dir or Path(mkdtemp(prefix="phi4-parity-"))

    def body(worker: WorkerEnvironment) -> None:
        from phi4.verify.parity import run_case
        from phi4.verify.ranks import run_in_turn

        run = partial(
            run_case,
            objective=stage_of(recipe).make_objective(recipe),
            steps=steps,
            work_dir=work_dir,
        )
        run_in_turn([reference, *possible], worker.rank, run, kind="cpu", work_dir=work_dir)

    code = on_ranks(
        [*sys.argv[1:], "--work-dir", str(work_dir)],
        body,
        num_workers=max(case.world_size for case in [reference, *possible]),
        work_dir=work_dir,
    )
    if code or not started_here:
        raise typer.Exit(code)
    results = [(case, compare(case, reference, work_dir)) for case in possible]
    _print_parity(results, impossible)
    if json_file:
        _write_parity(results, steps, json_file)
    raise typer.Exit(0 if all(result.passed for _, result in results) else 1)


def _write_parity(results: Results, steps: int, json_file: Path) -> None:
    from phi4.verify.measured_rows import append_row

    worst = max((result for _, result in results), key=lambda result: result.parameter_error)
    row = {
        "benchmark": "parity",
        "steps": steps,
        "layouts": [case.name for case, _ in results],
        "passed": all(result.passed for _, result in results),
        "worst_loss_error": max(result.loss_error for _, result in results),
        "worst_parameter_error": worst.parameter_error,
        "worst_parameter": f"{worst.name}: {worst.worst_parameter}",
    }
    append_row(json_file, row)


def _print_parity(results: Results, impossible: dict[str, str]) -> None:
    from phi4.verify.parity import GROUP_NORM_TOLERANCE, LOSS_TOLERANCE, PARAMETER_TOLERANCE

    table = Table(
        title=f"parity with one process (loss <= {LOSS_TOLERANCE:g}, norms of groups <= "
        f"{GROUP_NORM_TOLERANCE:g}, parameters <= {PARAMETER_TOLERANCE:g}, recompute bit-identical)"
    )
    columns = ("layout", "processes", "loss", "gradient norm", "norms of groups", "parameters")
    for column in (*columns, "worst", "same work", ""):
        table.add_column(column)
    for case, result in results:
        table.add_row(
            case.name,
            str(case.world_size),
            f"{result.loss_error:.1e}",
            f"{result.grad_norm_error:.1e}",
            f"{result.group_norm_error:.1e}",
            f"{result.parameter_error:.1e}",
            result.worst_parameter,
            "yes" if result.same_work else "[red]no[/red]",
            "ok" if result.passed else "[red]FAILED[/red]",
        )
    console = table_console()
    console.print(table)
    for name, rule in impossible.items():
        console.print(f"{name}: not possible for this recipe: {rule}")


@app.command()
def resume(
    recipe_path: RecipePath = DEFAULT_RECIPE,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps of the uninterrupted run.")] = 10,
) -> None:
    """Check that a resumed run is bit-identical to an uninterrupted one. Exit 1 if it differs."""
    from phi4.verify.resume import compare_runs, resumed_recipe, straight_recipe

    work_dir = Path(mkdtemp(prefix="phi4-resume-"))
    straight = straight_recipe(load_recipe(recipe_path, overrides or []), steps, work_dir)
    check(straight)
    _train(straight, work_dir / "straight.toml")
    resumed = resumed_recipe(straight, work_dir)
    _train(resumed, work_dir / "resumed.toml")
    report = compare_runs(straight, resumed)
    for line in report.differences:
        typer.echo(line)
    verdict = "FAILED" if report.differences else "bit-identical"
    typer.echo(f"resume: steps {report.first_step} to {report.last_step} {verdict}")
    raise typer.Exit(1 if report.differences else 0)


def _train(recipe: Recipe, path: Path) -> None:
    path.write_text(dump_toml(recipe), encoding="utf-8")
    code = subprocess.run(
        [sys.executable, "-m", "phi4", "train", str(path)], check=False
    ).returncode
    if code:
        raise typer.Exit(code)
