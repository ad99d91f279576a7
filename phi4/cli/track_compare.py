"""`phi4 track compare`: differences of two runs in recipe, loss and speed."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from phi4.cli.tables import table_console
from phi4.data.files.atomic_files import file_error
from phi4.rundir.goodput import BUCKETS
from phi4.rundir.run_record import read_run
from phi4.track.compare import Reach, RunComparison, compare_runs
from phi4.track.noise import IntervalEstimate
from phi4.track.report import write_report

_MOST_HELD_OUT = 12


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 track`."""
    app.command("compare")(compare)


def compare(
    a: Annotated[Path, typer.Argument(help="Run directory.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Run directory to compare with.", metavar="B")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write an HTML report of both runs to this file.")
    ] = None,
) -> None:
    """Compare two runs: recipes, losses at equal tokens, throughput, goodput.

    Differences of losses have 95% intervals that account for the correlation of consecutive steps.
    They cover the noise of these two runs, not the variation between seeds.
    """
    found = compare_runs(read_run(a), read_run(b))
    if html is not None:
        try:
            write_report([a, b], html)
        except OSError as error:
            raise file_error(error) from error
    if as_json:
        typer.echo(json.dumps(_json_values(found.to_json()), indent=1, allow_nan=False))
        return
    console = table_console()
    console.print(f"A: {escape(str(a))}\nB: {escape(str(b))}", highlight=False)
    for warning in found.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    for table in (_recipes(found), _losses(found), _held_out(found), _goodput(found)):
        if table is not None:
            console.print(table)
    for line in _lines(found):
        console.print(escape(line), highlight=False)
    if html is not None:
        console.print(escape(f"{html}: both runs in a page"), highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _recipes(found: RunComparison) -> Table | None:
    rows = [
        (kind, key, *(_short(value) for value in values))
        for kind, keys in found.differing.items()
        for key, values in keys.items()
    ]
    if not rows:
        return None
    table = _table("Keys that differ", "kind", "key", "A", "B")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _losses(found: RunComparison) -> Table | None:
    if not found.losses:
        return None
    how = (
        "paired: same data in the same order"
        if found.is_paired
        else "not paired: other data or order"
    )
    title = f"Training loss, B minus A, at equal tokens ({how})"
    table = _table(title, "tokens", "B - A", "95% interval", "")
    for part in found.losses:
        where = f"{part.from_tokens:,.0f} to {part.to_tokens:,.0f}"
        shown = (f"{part.gap.value:+.4f}", _interval(part.gap)) if part.gap else ("", "")
        table.add_row(where, *shown, part.verdict())
    return table


def _interval(estimate: IntervalEstimate) -> str:
    return f"{estimate.low:+.4f} to {estimate.high:+.4f}"


def _held_out(found: RunComparison) -> Table | None:
    if not found.held_out:
        return None
    table = _table("Held-out loss at equal tokens", "tokens", "of", "A", "B", "B - A")
    for gap in found.held_out[-_MOST_HELD_OUT:]:
        numbers = (f"{gap.a:.4f}", f"{gap.b:.4f}", f"{gap.b - gap.a:+.4f}")
        name = gap.name.removeprefix("held_out_loss").lstrip("/") or "all"
        table.add_row(f"{gap.tokens:,.0f}", escape(name), *numbers)
    if len(found.held_out) > _MOST_HELD_OUT:
        table.caption = f"the last {_MOST_HELD_OUT} of {len(found.held_out)}; --json has all"
    return table


def _goodput(found: RunComparison) -> Table | None:
    if found.goodput == (None, None):
        return None
    table = _table("Wall time", "bucket", "A", "", "B", "")
    for bucket in BUCKETS:
        cells = [cell for one in found.goodput for cell in _bucket(one, bucket)]
        if any(cells):
            table.add_row(bucket.replace("_", " "), *cells)
    totals = [f"{one.wall_seconds:.1f} s" if one else "not recorded" for one in found.goodput]
    table.add_row("wall time", totals[0], "", totals[1], "")
    return table


def _bucket(goodput: Any, bucket: str) -> tuple[str, str]:
    if goodput is None or not goodput.seconds.get(bucket):
        return "", ""
    seconds = goodput.seconds[bucket]
    return f"{seconds:.1f} s", f"{seconds / goodput.wall_seconds:.1%}"


def _lines(found: RunComparison) -> list[str]:
    lines = []
    if not any(found.differing.values()):
        lines.append("The recipes are the same but for the name and the directory.")
    if found.throughput is not None:
        rate = found.throughput
        is_same = rate.low <= 1.0 <= rate.high
        lines.append(
            f"Throughput: B has {rate.value:.3f} times the tokens per second of A (medians; 95% "
            f"{rate.low:.3f} to {rate.high:.3f}){': no difference shown' if is_same else ''}."
        )
    if found.reach is not None:
        lines.append(_reach(found.reach))
    return lines


def _reach(reach: Reach) -> str:
    final = f"A's final loss, {reach.loss:.4f} (mean of its last {reach.span_tokens:,.0f} tokens)"
    if reach.step is None or reach.tokens is None:
        return f"B never reaches {final}."
    times = reach.tokens / reach.a_tokens
    return (
        f"B reaches {final}, at step {reach.step:,} and {reach.tokens:,.0f} tokens: {times:.3f} "
        "times the tokens of A."
    )


def _json_values(value: Any) -> Any:
    """Without what JSON has not: NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(key): _json_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
