"""The HTML page: one file with its scripts, styles and data, which makes no network requests.

A content security policy in the page blocks all requests, regardless of the record's content and of
plotly.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from phi4 import __version__
from phi4.config import dump_toml
from phi4.data.files.atomic_files import write_atomically
from phi4.track.report.facts import facts_of
from phi4.track.report.quantities import moment, time_unit
from phi4.track.report.reported_run import ReportedRun, read_reported
from phi4.track.report.run_charts import run_charts
from phi4.track.report.tables import tables_of
from phi4.track.report.training_charts import training_charts

MAX_POINTS = 5_000
"""Maximum number of points of a curve."""

_PAGE_POINTS = 120_000
"""Maximum number of points of all curves: about 6 MB."""


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page of runs, the first one first; return `out`.

    Raises:
        DataError, ConfigError: as `read_reported`.
        OSError: the file cannot be written.
    """
    runs = read_reported(run_dirs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page_of(runs, now=time.time()).encode())
    return out


def page_of(runs: Sequence[ReportedRun], now: float) -> str:
    """Return the page's HTML.

    Args:
        runs: runs to compare, at least one.
        now: seconds since the epoch, shown on the page.
    """
    # Its script is 4.8 MB and is only needed here.
    from plotly.offline import get_plotlyjs

    limit = _points_of_a_curve(runs)
    shared = training_charts(runs, limit)
    views = [_view(run, now, limit) for run in runs]
    charts = [*shared, *(c for view in views for some in view["charts"].values() for c in some)]
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=", ".join(run.label for run in runs),
        runs=views,
        fact_rows=list(zip(*(view["facts"] for view in views), strict=True)),
        shared=shared,
        has_times=any(run.began_unix for run in runs),
        charts_json=_embedded({"charts": [c.to_json() for c in charts], "time": _time_axis(runs)}),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        written_at=moment(now),
        version=__version__,
    )


def _view(run: ReportedRun, now: float, limit: int) -> dict[str, Any]:
    return {
        "index": run.index,
        "label": run.label,
        "colour": run.colour,
        "facts": facts_of(run, now),
        "tables": tables_of(run),
        "charts": run_charts(run, limit),
        "recipe": dump_toml(run.record.recipe),
        "problems": run.problems,
    }


def _points_of_a_curve(runs: Sequence[ReportedRun]) -> int:
    """Return the limit of points per curve for a page with this many curves."""
    prefixes = ("grad_norm/", "memory/", "data/", "rewards/", "logps/", "held_out_loss")
    num_curves = sum(
        7 + sum(len(run.lines.keys_under(prefix)) for prefix in prefixes) + _num_system(run)
        for run in runs
    )
    return max(100, min(MAX_POINTS, _PAGE_POINTS // num_curves))


def _num_system(run: ReportedRun) -> int:
    """Return the number of values in samples of all machines."""
    return sum(len(samples[-1]) for samples in run.samples.values() if samples)


def _time_axis(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    longest = 0.0
    for run in runs:
        seconds = run.lines.curve("loss").xs["seconds"]
        if np.isfinite(seconds).any():
            longest = max(longest, float(np.nanmax(seconds)))
    divisor, unit = time_unit(longest)
    return {"divisor": divisor, "unit": unit}


def _embedded(tree: dict[str, Any]) -> Markup:
    """Return JSON that is safe inside a script element."""
    text = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
