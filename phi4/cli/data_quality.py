"""`phi4 data decontaminate`, `deduplicate` and `filter`: text filters before tokenization."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from phi4.data.screens.decontaminate import (
    NORMALISATIONS,
    Detector,
    Item,
    Thresholds,
    decontaminate,
    learn_allowed,
    read_benchmarks,
)
from phi4.data.screens.decontaminate.rule import default_thresholds
from phi4.data.screens.decontaminate.run import Tally
from phi4.data.screens.decontaminate.self_test.items import self_test_text
from phi4.data.screens.decontaminate.self_test.run import report, run_self_test
from phi4.data.screens.quality.filter import (
    ACCEPTED_SHARE,
    CorruptionLimit,
    Filter,
    learn_from_rows,
    load_identify,
)
from phi4.data.screens.quality.inputs import list_inputs
from phi4.data.screens.quality.outputs import QUARANTINE
from phi4.data.screens.quality.rows import RowFormat, parse, read_lines, text_of
from phi4.data.screens.quality.screen import MAX_BAD_ROWS, Rule, Screened, screen
from phi4.errors import DataError

_INPUTS_HELP = "JSON Lines, plain or compressed, parquet, directories of them."
Inputs = Annotated[list[Path] | None, typer.Argument(help=_INPUTS_HELP)]
RequiredInputs = Annotated[list[Path], typer.Argument(help=_INPUTS_HELP)]
RequiredOut = Annotated[
    Path, typer.Option("--out", help="Directory for the kept rows and quarantine.rejects.")
]
Out = Annotated[
    Path | None,
    typer.Option(help="Directory for the kept rows, quarantine.rejects and decontaminate.report."),
]
TextField = Annotated[str, typer.Option(help="Column of the text.")]
Workers = Annotated[int, typer.Option(min=1, help="Worker processes.")]
MaxBadRows = Annotated[int, typer.Option(min=0, help="Abort after more unreadable rows than this.")]
Normalisation = Annotated[
    Literal["robust", "paper"],
    typer.Option(help="How texts are split into words; paper is the report's rule."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `phi4 data`."""
    app.command("decontaminate")(decontaminate_command)
    app.command("deduplicate")(deduplicate_command)
    app.command("filter")(filter_command)


def decontaminate_command(
    inputs: Inputs = None,
    benchmark: Annotated[
        list[Path] | None, typer.Option(help="Benchmark items, in the same formats; repeatable.")
    ] = None,
    out: Out = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="Rows without benchmark items; 13-grams common in them are allowed."),
    ] = None,
    allow_from: Annotated[
        int, typer.Option(min=1, help="A 13-gram in this many reference rows is common.")
    ] = 2,
    normalisation: Normalisation = "robust",
    info: Annotated[
        float | None, typer.Option(min=0, max=1, help="7-gram share of a partial match.")
    ] = None,
    contaminated: Annotated[
        float | None, typer.Option(min=0, max=1, help="7-gram share of a contaminated row.")
    ] = None,
    text_field: TextField = "text",
    workers: Workers = 1,
    max_bad_rows: MaxBadRows = MAX_BAD_ROWS,
    self_test: Annotated[
        bool,
        typer.Option(help="Insert items into clean text (INPUTS) and show how many are found."),
    ] = False,
) -> None:
    """Remove rows that contain benchmark items, by the report's 13-gram and 7-gram rule.

    With --self-test, measure how many inserted items the rule finds instead.
    """
    thresholds = _thresholds(normalisation, info, contaminated)
    items = read_benchmarks(benchmark or [])
    rows = RowFormat(text_field)
    if self_test:
        paths = [item.path for item in list_inputs(inputs or [])]
        clean = [text_of(parse(line), rows) for line in read_lines(paths, rows)]
        _echo_self_test(clean, items, normalisation, thresholds)
        return
    if not inputs or not items or out is None:
        raise DataError(
            "decontaminate needs rows, --benchmark FILE and --out DIRECTORY; or --self-test alone"
        )
    start = time.monotonic()
    detector = Detector(items, normalisation, thresholds)
    if reference:
        learn_allowed(detector, reference, allow_from, row_format=rows, num_workers=workers)
    screened, tally = decontaminate(
        inputs, detector, out, row_format=rows, num_workers=workers, max_bad_rows=max_bad_rows
    )
    typer.echo(_benchmark_table(tally))
    if reference:
        typer.echo(f"{len(detector.allowed())} 13-grams of the benchmarks are on the allow-list")
    typer.echo(f"{tally.num_partial} partial matches, kept")
    _echo_screened(screened, out, start)


def deduplicate_command(
    inputs: RequiredInputs,
    out: RequiredOut,
    similarity: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Rows whose 5-word shingles have this Jaccard similarity are equal."
        ),
    ] = 0.8,
    exact: Annotated[bool, typer.Option(help="Find equal texts only.")] = False,
    text_field: TextField = "text",
    workers: Workers = 1,
    max_bad_rows: MaxBadRows = MAX_BAD_ROWS,
) -> None:
    """Keep the first of each set of equal or nearly equal rows."""
    # The libraries belong to an extra; the other commands work without them.
    from phi4.data.screens.quality.duplicates import Duplicates

    start = time.monotonic()
    duplicates = Duplicates(None if exact else similarity)
    screened = screen(
        inputs,
        out,
        Rule(duplicates.sketcher(), duplicates.decide),
        row_format=RowFormat(text_field),
        num_workers=workers,
        max_bad_rows=max_bad_rows,
    )
    _echo_screened(screened, out, start)


def filter_command(
    inputs: RequiredInputs,
    out: RequiredOut,
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="Normal text to learn from; by default the inputs themselves."),
    ] = None,
    max_deviations: Annotated[
        float,
        typer.Option(min=0, help="Text is corrupted from this many deviations from the median on."),
    ] = 8.0,
    accept_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of corrupted texts above which nothing is kept."),
    ] = ACCEPTED_SHARE,
    identify: Annotated[
        str | None, typer.Option(help="module:function that maps a text to its language code.")
    ] = None,
    languages: Annotated[
        str, typer.Option(help="Language codes to keep, separated by commas.")
    ] = "",
    text_field: TextField = "text",
    workers: Workers = 1,
    max_bad_rows: MaxBadRows = MAX_BAD_ROWS,
) -> None:
    """Remove corrupted text, by n-gram statistics and compression, and other languages.

    Without --reference, normal text is learned from the inputs. If more than --accept-share of them
    then count as corrupted, the reference itself is in doubt and nothing is kept.
    """
    start = time.monotonic()
    rows = RowFormat(text_field)
    keep = Filter(
        learn_from_rows(reference or inputs, rows),
        max_deviations,
        load_identify(identify) if identify else None,
        frozenset(code.strip() for code in languages.split(",") if code.strip()),
    )
    look = f"look at {out / QUARANTINE}.part"
    if reference:
        remedy = f"{look}, then take a reference that is like the inputs, or raise --accept-share"
    else:
        remedy = (
            "normal was learned from the inputs themselves, which is wrong where many of them are "
            f"corrupted; {look}, then give --reference FILE of good text, or raise --accept-share"
        )
    screened = screen(
        inputs,
        out,
        CorruptionLimit(keep, accept_share, remedy).rule(),
        row_format=rows,
        num_workers=workers,
        max_bad_rows=max_bad_rows,
    )
    _echo_screened(screened, out, start)


def _thresholds(normalisation: str, info: float | None, contaminated: float | None) -> Thresholds:
    default = default_thresholds(normalisation)
    contaminated = default.contaminated if contaminated is None else contaminated
    return Thresholds(min(default.info, contaminated) if info is None else info, contaminated)


def _echo_self_test(
    clean: list[str], items: list[Item], normalisation: str, thresholds: Thresholds
) -> None:
    def follow(work: str) -> None:
        typer.echo(work, err=True)

    follow("reading this Python's documentation")
    text = self_test_text(clean, items)
    names = sorted(NORMALISATIONS, key=lambda name: name != normalisation)
    results = [
        run_self_test(text, name, thresholds if name == normalisation else None, follow=follow)
        for name in names
    ]
    typer.echo(report(results))


def _benchmark_table(tally: Tally) -> str:
    lines = [
        f"{'benchmark':24} {'items':>8} {'too short':>9} {'found':>8} {'rows 13-gram':>12} "
        f"{'rows 7-gram':>11} {'partial':>8}"
    ]
    lines += [
        f"{name:24} {count.num_items:>8} {count.num_too_short:>9} {len(count.items_found):>8} "
        f"{count.rows_13gram:>12} {count.rows_7gram:>11} {count.rows_partial:>8}"
        for name, count in tally.benchmarks.items()
    ]
    return "\n".join(lines)


def _echo_screened(screened: Screened, out: Path, start: float) -> None:
    typer.echo(f"{screened.summary()}; {out}, {time.monotonic() - start:.1f} s")
