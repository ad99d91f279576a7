"""Show that a search over mixtures finds the useless one, small and large, in minutes.

python -m tools.sweep_proof --json benchmarks/sweep.jsonl

Runs examples/sweeps/mixtures.toml afresh and reads its own tables: `garbage`, web text with its
tokens shuffled, has to be last at both scales over three seeds. Pictures stay in runs/prove/sweep.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi4.verify.measured_rows import append_row

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "examples" / "sweeps" / "mixtures.toml"
OUT = Path("runs/prove/sweep")
GARBAGE = "garbage"
MOST_CPU_SECONDS = 1200
"""Ten minutes of two cores: other work may share the machine, so wall time is only reported."""


def phi4(*words: object) -> str:
    """Output of a command of the sweep; what goes to stderr is shown."""
    command = [sys.executable, "-m", "phi4", "sweep", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_afresh() -> tuple[Path, dict[str, Any]]:
    """Run the whole sweep; its file, and what it cost."""
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).mkdir(parents=True)
    file = ROOT / OUT / SWEEP.name
    text = SWEEP.read_text(encoding="utf-8")
    file.write_text(text.replace("runs/sweeps/mixtures", str(OUT)), encoding="utf-8")
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    print(phi4("run", file), end="")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = time.monotonic() - begun
    return file, {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}


def verdict(cells: Sequence[dict[str, Any]], metric: str) -> tuple[bool, dict[str, Any]]:
    """Whether garbage is last at every scale and clearly behind the baseline, with the figures."""
    figures, passed = {}, True
    for scale in dict.fromkeys(cell["scale"] for cell in cells):
        column = [c for c in cells if c["scale"] == scale and c["metric"] == metric]
        [garbage] = [cell for cell in column if cell["variant"] == GARBAGE]
        passed &= garbage["rank"] == len(column) and garbage["difference"]["low"] > 0
        figures[scale] = {
            "loss": {cell["variant"]: round(cell["mean"]["mean"], 4) for cell in column},
            "garbage_behind_baseline": [
                round(garbage["difference"][bound], 4) for bound in ("low", "mean", "high")
            ],
        }
    return passed, figures


def main() -> int:
    """Command line; exit 1 when garbage is not last, or the sweep costs too much."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append the result as a row to this file")
    json_file = parser.parse_args().json
    file, cost = run_afresh()
    print(phi4("table", file))
    print(phi4("table", file, "--analysis", "ranks"))
    table = json.loads(phi4("table", file, "--json"))
    [pair] = json.loads(phi4("table", file, "--analysis", "ranks", "--json"))["pairs"]
    is_last, figures = verdict(table["cells"], "held_out_loss")
    row = {
        "benchmark": "sweep",
        "sweep": SWEEP.stem,
        "num_runs": sum(cell["num_runs"] for cell in table["cells"] if "/" not in cell["metric"]),
        "passed": is_last and cost["cpu_seconds"] <= MOST_CPU_SECONDS,
        **cost,
        "scales": figures,
        "spearman": [pair["spearman"], *pair["spearman_interval"]],
        "kendall": [pair["kendall"], *pair["kendall_interval"]],
        "share_by_chance": pair["p_value"],
    }
    if json_file:
        append_row(json_file, row)
    place = "last" if is_last else "NOT last"
    print(
        f"{row['num_runs']} runs took {cost['cpu_seconds']} CPU seconds of {MOST_CPU_SECONDS}, "
        f"{cost['seconds']} s of wall time; garbage is {place} at every scale"
    )
    return 0 if row["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
