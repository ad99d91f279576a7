"""`phi4 kernels`: which implementations of the ops exist, what is proven, and the proof itself."""

from typing import Annotated

import typer
from rich.table import Table

from phi4.cli.tables import table_console
from phi4.errors import ConfigError, PlatformError

app = typer.Typer(no_args_is_help=True)


@app.command()
def status() -> None:
    """List every op and implementation with its validation state and the GPU run behind it."""
    from phi4_kernels import dispatch

    table = Table(title="`auto` takes what is proven on the GPU at hand; the rest runs when named")
    columns = ("op", "implementation", "state", "device", "commit", "date")
    for column in columns:
        table.add_column(column)
    for row in dispatch.status():
        table.add_row(*(row[column] for column in columns))
    _print(table)


@app.command()
def qualify(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; repeatable.")] = None,
    again: Annotated[
        bool, typer.Option(help="Repeat qualifications that are already recorded.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Time limit for all ops.", min=1.0)] = 60.0,
) -> None:
    """Validate the kernels on this machine's GPU, and time them against torch.

    `phi4 train` does this at its start if validations are missing (kernels.qualify). Results are
    kept in ~/.cache/phi4/kernels.jsonl. Exit code 1 when a kernel fails.
    """
    import torch
    from phi4_kernels import registry
    from phi4_kernels.qualification import qualify as run

    if unknown := set(op or ()) - set(registry.OPS):
        raise ConfigError(f"no op {sorted(unknown)[0]!r}; there are {', '.join(registry.OPS)}")
    if not torch.cuda.is_available():
        raise PlatformError(
            "torch finds no CUDA device, so there is nothing to qualify; on a CPU every op is "
            "torch's, and `phi4 kernels status` says what is proven elsewhere"
        )
    from phi4_kernels.qualification.gpu import GpuProver

    prover = GpuProver(torch.device("cuda", torch.cuda.current_device()))
    done = run(prover, ops=tuple(op or registry.OPS), again=again, limit_seconds=seconds)
    table = Table(title=f"{prover.machine.device}, {done.seconds:.0f} s")
    for column in ("op", "implementation", "verdict", ""):
        table.add_column(column)
    for found in done.findings:
        table.add_row(found.op, found.implementation, found.verdict, found.detail)
    _print(table)
    if done.problem is not None:
        print(f"not kept for later runs: {done.problem}")
    raise SystemExit(int(any(found.verdict == "red" for found in done.findings)))


@app.command()
def show(
    op: Annotated[str, typer.Argument(help="Op, as listed by `phi4 kernels status`.")],
    implementation: Annotated[
        str | None,
        typer.Option(help="Implementation to measure; by default the op's default kernel."),
    ] = None,
) -> None:
    """Show error margins, machine code statistics, floor and times of an op.

    Without a GPU, Triton kernels are interpreted and compiled for sm_90, which takes up to two
    minutes; with one they are run and timed against torch. Exit code 1 when a kernel fails.
    """
    from phi4_kernels import registry

    if op not in registry.OPS:
        raise ConfigError(f"no op {op!r}; there are {', '.join(registry.OPS)}")
    names = registry.implementations(op)
    if implementation is not None and implementation not in names:
        raise ConfigError(f"{op} has no {implementation!r}; there are {', '.join(names)}")
    from phi4_kernels.qualification.overview import overview

    is_red = False
    for section in overview(op, implementation):
        table = Table(title=section.title, title_justify="left", title_style="bold")
        for column in section.head:
            table.add_column(column, overflow="fold")
        for row in section.rows:
            table.add_row(*row)
        _print(table if section.rows else section.title)
        if section.note:
            print(section.note)
        is_red |= any(cell.startswith("RED") for row in section.rows for cell in row)
    raise SystemExit(int(is_red))


def _print(table: Table | str) -> None:
    table_console().print(table)
