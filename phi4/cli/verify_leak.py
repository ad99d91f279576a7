"""`phi4 verify leak`: no document reaches another, in any layout."""

import sys
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from phi4.cli.tables import table_console
from phi4.config import check, load_recipe
from phi4.launch import WorkerEnvironment, on_ranks
from phi4.stages import require_stage, stage_of

if TYPE_CHECKING:
    from phi4.verify.leak import LeakFindings

DEFAULT_RECIPE = Path("examples/recipes/tiny_pretrain.toml")


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 verify`."""
    app.command("leak")(leak)


def leak(
    recipe_path: Annotated[Path, typer.Argument(help="A .toml recipe.")] = DEFAULT_RECIPE,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value.")] = None,
    layouts: Annotated[
        str,
        typer.Option(
            help="Comma-separated layouts of `phi4 verify parity`; by default a selection."
        ),
    ] = "",
    work_dir: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Check document isolation: changing one document must leave all others bit-identical.

    Losses, logits and gradients are compared; exit 1 when any differs. Every layout first runs
    without the document mask, where the check must find the leak.
    """
    from phi4.engine.platform import choose_kind
    from phi4.verify.layouts import LEAK_LAYOUTS, cases, names_of, reference_case
    from phi4.verify.leak import leak_case, read_findings
    from phi4.verify.ranks import within_devices

    recipe = load_recipe(recipe_path, overrides or [])
    reference = leak_case(reference_case(recipe), recipe)
    require_stage(recipe)
    check(reference.recipe)
    possible, impossible = cases(recipe, names_of(layouts, LEAK_LAYOUTS))
    kind, _ = choose_kind(recipe.run.platform)
    chosen = [reference, *(leak_case(case, recipe) for case in possible)]
    chosen, too_large = within_devices(chosen, kind)
    started_here = work_dir is None
    work_dir = work_dir or Path(mkdtemp(prefix="phi4-leak-"))

    def body(worker: WorkerEnvironment) -> None:
        from phi4.verify.leak import run_leak
        from phi4.verify.ranks import run_in_turn

        run = partial(
            run_leak, objective=stage_of(recipe).make_objective(recipe), work_dir=work_dir
        )
        run_in_turn(chosen, worker.rank, run, kind=kind, work_dir=work_dir)

    code = on_ranks(
        [*sys.argv[1:], "--work-dir", str(work_dir)],
        body,
        num_workers=max(case.world_size for case in chosen),
        work_dir=work_dir,
    )
    if code or not started_here:
        raise typer.Exit(code)
    findings = [read_findings(case, work_dir) for case in chosen]
    _print(findings, impossible | too_large)
    raise typer.Exit(0 if all(found.passed for found in findings) else 1)


def _print(findings: list["LeakFindings"], impossible: dict[str, str]) -> None:
    from phi4.verify.leak import DOCUMENTS

    table = Table(title="what changes elsewhere with one document's tokens (nothing may)")
    for column in ("layout", "processes", "mask off", *DOCUMENTS, ""):
        table.add_column(column)
    for found in findings:
        table.add_row(
            found.case.name,
            str(found.case.world_size),
            "leak found" if found.sees else "[red]blind[/red]",
            *(found.leaks(document) or "nothing" for document in DOCUMENTS),
            "ok" if found.passed else "[red]FAILED[/red]",
        )
    console = table_console()
    console.print(table)
    for name, reason in impossible.items():
        console.print(f"{name}: not possible here: {reason}")
