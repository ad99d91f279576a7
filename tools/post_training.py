"""The chain of `phi4 demo --post-training` over several seeds, and pivots against whole answers.

Four questions, each answered by a row of figures, whatever they are:

- `chain`: does every stage answer more of the held-out problems than the one before it, by more
  than two standard errors, paired? This one is the verdict.
- `full_pairs_equal_pairs`: the result with as many pairs of whole answers instead of the pivots.
- `full_pairs_equal_completions`: and of the pairs that as many completions give as the search drew?
- `--tasks long`: all of this again on answers of 42 tokens, whose writer errs half as often.

Seeds are made of the hash of the recipes and of the chain, so they are drawn when those are frozen,
so their test questions are unseen.

    python -m tools.post_training --draw 3 --json benchmarks/post_training.jsonl
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from phi4.cli.demo_commands import run_phi4
from phi4.cli.demo_figures import figures_row, table
from phi4.cli.demo_post_training import (
    ORACLE,
    ChainSettings,
    PostTraining,
    StageFigures,
    gains,
    run_chain,
)
from phi4.pts.score import Estimate, gain
from phi4.pts.select_checkpoint import read_selection
from phi4.rundir.names import SELECTED_FILE
from phi4.verify.measured_rows import append_row, provenance

LEAST_ERRORS = 2.0
"""Standard errors that a stage has to gain."""
LONG_OPERATORS, LONG_PRECEDENCE_ERROR = 6, 0.2
LONG_BASE = ("run.steps=2000",)
"""Documents of the long task have three times the tokens."""
FROZEN = (
    "examples/recipes/reasoning_*.toml",
    "phi4/cli/demo_post_training.py",
    "phi4/data/demo/reasoning.py",
)
"""What seeds are drawn from."""
MOST_COMPARISONS = 40
"""Of a question's answers; more would only repeat the answers."""


def main() -> int:
    """Command line; exit 1 where a stage of the short task gains too little."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draw", type=int, default=3, help="number of seeds")
    parser.add_argument("--seeds", type=int, nargs="+", help="these seeds in place of drawn ones")
    parser.add_argument("--out", type=Path, default=Path("runs/post_training"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--tasks", nargs="+", choices=("short", "long"), default=["short"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="of all recipes, as run.steps=2")
    asked = parser.parse_args()
    seeds = asked.seeds or drawn_seeds(asked.draw)
    commit = provenance()["commit"]
    failed = []
    for task in asked.tasks:
        for seed in seeds:
            settings = _settings(task, seed, asked.out, asked.scale, asked.overrides)
            rows = list(measure(settings))
            for row in rows:
                row = {"benchmark": "post_training", "task": task, "seed": seed, **row}
                print(json.dumps(row), flush=True)
                if asked.json:
                    append_row(asked.json, {"commit": commit, **row})
            if task == "short" and not rows[0]["passed"]:
                failed.append(seed)
    if failed:
        print(f"a stage gained too little with seeds {failed}")
        return 1
    if asked.tasks == ["long"]:
        print("measured; only the short task has a verdict")
        return 0
    print(
        f"every stage gained more than {LEAST_ERRORS:g} standard errors, short task, seeds {seeds}"
    )
    return 0


def drawn_seeds(num: int) -> list[int]:
    """Seeds that follow from the recipes and the chain as they stand."""
    digest = hashlib.sha256()
    for pattern in FROZEN:
        for path in sorted(Path().glob(pattern)):
            digest.update(path.read_bytes())
    numbers = digest.digest()
    return [int.from_bytes(numbers[2 * index : 2 * index + 2]) for index in range(num)]


def measure(settings: ChainSettings) -> list[dict[str, object]]:
    """Return a row of the chain, and one of each comparison with whole answers."""
    started = time.monotonic()
    figures = run_chain(settings)
    print("\n".join(table(figures)), flush=True)
    passed = all(_errors(one) > LEAST_ERRORS for one in gains(figures).values())
    rows: list[dict[str, object]] = [
        {
            "measured": "chain",
            "passed": passed,
            "seconds": round(time.monotonic() - started),
            **figures_row(settings, figures),
        }
    ]
    pivotal = next(one for one in figures if one.name == "DPO 1")
    for name, num_pairs in whole_answers(settings).items():
        other = trained_on(settings, name)
        rows.append(_compared(name, num_pairs, pivotal, other))
    return rows


def whole_answers(settings: ChainSettings) -> dict[str, int]:
    """Write pairs of whole answers of the model that was searched, to the same questions.

    Returns:
        Number of pairs by the name of their token file.
    """
    chain = PostTraining(settings)
    start = read_selection(settings.out / "sft" / SELECTED_FILE).checkpoint
    report = json.loads((settings.out / "search/report.json").read_text())
    trajectories = map(json.loads, (chain.data / "pivots.jsonl").read_text().splitlines())
    num_pivots = sum(len(one["pivots"]) for one in trajectories)
    num_answers = max(2, round(report["completions"] / report["questions"]))
    answers, found = settings.out / "answers/whole.jsonl", settings.out / "whole"
    chain.draw(
        f"As many answers as the search drew completions: {num_answers} to each question.",
        *(Path(start), "search", answers, num_answers, "--chat"),
    )
    run_phi4(
        "Right ones and wrong ones become pairs.",
        *("judge", "pairs", f"--answers={answers}", f"--judge=oracle:{ORACLE}", f"--out={found}"),
        *("pairs.same_model=true", f"pairs.max_per_prompt={MOST_COMPARISONS}"),
    )
    rows = (found / "overall.jsonl").read_text().splitlines(keepends=True)
    few = rows[:: max(1, len(rows) // num_pivots)][:num_pivots]
    sets = {"full_pairs_equal_pairs": few, "full_pairs_equal_completions": rows}
    for name, lines in sets.items():
        path = chain.data / f"{name}.jsonl"
        path.write_text("".join(lines))
        chain.write_pairs(path)
    return {name: len(lines) for name, lines in sets.items()}


def trained_on(settings: ChainSettings, name: str) -> StageFigures:
    """Return the model that whole answers make in place of the pivots."""
    chain = PostTraining(settings)
    start = Path(read_selection(settings.out / "sft" / SELECTED_FILE).checkpoint)
    source = f'data.sources=[{{ name = "whole", path = "{chain.data / name}", kind = "pairs" }}]'
    return chain.figures(name, chain.preferred("dpo_judge", start, name, source))


def _compared(
    name: str, num_pairs: int, pivotal: StageFigures, other: StageFigures
) -> dict[str, object]:
    pivots_over = gain(other.sampled, pivotal.sampled)
    print(f"pivots over {name}: {pivots_over.mean:+.3f} ± {pivots_over.standard_error:.3f}")
    return {
        "measured": name,
        "pairs": num_pairs,
        "sampled": vars(other.sampled.accuracy),
        "greedy": vars(other.greedy.accuracy),
        "pivots_over_it": vars(pivots_over),
    }


def _settings(
    task: str, seed: int, out: Path, scale: float, overrides: Sequence[str]
) -> ChainSettings:
    short = ChainSettings(
        out=out / f"{task}_{seed}", seed=seed, scale=scale, overrides=tuple(overrides)
    )
    if task == "short":
        return short
    return replace(
        short,
        num_operators=LONG_OPERATORS,
        precedence_error=LONG_PRECEDENCE_ERROR,
        base_overrides=LONG_BASE,
    )


def _errors(one: Estimate) -> float:
    """Return a gain in its standard errors."""
    return one.mean / one.standard_error if one.standard_error else 0.0


if __name__ == "__main__":
    sys.exit(main())
