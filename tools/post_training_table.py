"""The committed rows of `tools/post_training.py`, as the table of docs/dpo.md and README's line.

python -m tools.post_training_table
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.marked_block import replace_block

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "post_training.jsonl"
PAGE = ROOT / "docs" / "dpo.md"
_STAGES = ("base", "SFT", "DPO 1", "DPO 2 only", "DPO 1 + 2")
_GAINS = ("SFT", "DPO 1", "DPO 1 + 2")
_WHOLE = ("full_pairs_equal_pairs", "full_pairs_equal_completions")
_TASKS = {"short": "12 tokens", "long": "42 tokens"}
Row = Mapping[str, Any]


def read_rows(path: Path = ROWS) -> list[Row]:
    """Return all rows of a file; none where it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def newest_runs(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows of each task and seed by what was measured, the newest ones."""
    runs: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        runs.setdefault((row["task"], row["seed"]), {})[row["measured"]] = row
    return sorted(runs.values(), key=lambda run: list(_TASKS).index(run["chain"]["task"]))


def page_table(rows: Sequence[Row]) -> str:
    """Markdown: a line per task and seed, and the three seeds of the short task together."""
    heads = (*("answers", "seed"), *_STAGES, "as many pairs", "as many completions")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(_cells(run))} |" for run in newest_runs(rows)]
    lines += ["", *_gain_lines(newest_runs(rows))]
    return "\n".join(lines).rstrip()


def pooled(estimates: Sequence[Row]) -> tuple[float, float]:
    """Mean and standard error of independent estimates together, each as heavy as the others."""
    mean = math.fsum(one["mean"] for one in estimates) / len(estimates)
    variance = math.fsum(one["standard_error"] ** 2 for one in estimates)
    return mean, math.sqrt(variance) / len(estimates)


def readme_line(rows: Sequence[Row]) -> tuple[str, str, str] | None:
    """Return what, result and commit of README's table; None without rows of the short task."""
    runs = [run for run in newest_runs(rows) if run["chain"]["task"] == "short"]
    if not runs:
        return None
    stages = ("base", *_GAINS)
    means = [pooled([run["chain"]["stages"][name]["sampled"] for run in runs]) for name in stages]
    gains = [pooled([run["chain"]["gains"][name] for run in runs]) for name in _GAINS]
    least = min(mean / error for mean, error in gains)
    figures = ", ".join(f"{name} {mean:.3f}" for name, (mean, _) in zip(stages, means, strict=True))
    what = "share of right sampled answers after each stage of `phi4 demo --post-training`"
    num_questions = runs[0]["chain"]["stages"]["base"]["sampled"]["num_questions"]
    result = (
        f"{figures}; {len(runs)} seeds of {num_questions} held-out problems, every step at least "
        f"{math.floor(10 * least) / 10} standard errors"
    )
    return what, result, runs[-1]["chain"]["commit"]


def _cells(run: Mapping[str, Row]) -> Iterator[str]:
    chain = run["chain"]
    yield _TASKS[chain["task"]]
    yield str(chain["seed"])
    for name in _STAGES:
        yield _shown(chain["stages"][name]["sampled"])
    for name in _WHOLE:
        yield f"{_shown(run[name]['sampled'])} ({run[name]['pairs']:,})" if name in run else ""


def _gain_lines(runs: Sequence[Mapping[str, Row]]) -> Iterator[str]:
    for task, length in _TASKS.items():
        of_task = [run for run in runs if run["chain"]["task"] == task]
        if not of_task:
            continue
        yield f"Answers of {length}, all seeds together:"
        yield ""
        for name in _GAINS:
            gain = pooled([run["chain"]["gains"][name] for run in of_task])
            yield f"- {name} over the stage before: {_signed(gain)}"
        for name, said in zip(_WHOLE, ("as many pairs", "as many completions"), strict=True):
            compared = [run[name]["pivots_over_it"] for run in of_task if name in run]
            if compared:
                yield f"- DPO 1 over whole answers, {said}: {_signed(pooled(compared))}"
        yield ""


def _signed(estimate: tuple[float, float]) -> str:
    mean, error = estimate
    return f"{mean:+.3f} ± {error:.3f}"


def _shown(estimate: Row) -> str:
    return f"{estimate['mean']:.3f} ± {estimate['standard_error']:.3f}"


def main() -> None:
    """Write the page."""
    table = page_table(read_rows())
    PAGE.write_text(replace_block(PAGE.read_text(), "post training", table), encoding="utf-8")


if __name__ == "__main__":
    main()
