"""Run a proof that is too long for the tests, and append its verdict to benchmarks/proofs.jsonl.

python -m tools.prove leak

`make prove-<name>` calls it. The tests run the smallest form of every proof here that its
mutants still turn red.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

from phi4.verify.measured_rows import append_row, provenance

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "proofs.jsonl"

PROOFS: dict[str, tuple[str, ...]] = {
    "parity": ("phi4", "verify", "parity", "--steps=10", "--json=benchmarks/parity.jsonl"),
    "parity-sft": ("phi4", "verify", "parity", "examples/recipes/tiny_sft.toml", "--steps=10"),
    "parity-dpo": ("phi4", "verify", "parity", "examples/recipes/tiny_dpo.toml", "--steps=10"),
    "leak": ("phi4", "verify", "leak"),
    "guard-cost": ("tools.guard_cost", "--pairs=200", "--json=benchmarks/guard_cost.jsonl"),
    "async-save": ("tools.async_save", "--json=benchmarks/async_save.jsonl"),
    "resume": ("phi4", "verify", "resume", "--steps=20"),
    "preempt": (
        *("phi4", "verify", "preempt", "examples/recipes/tiny_pretrain.toml"),
        *("parallel.tensor=1", "parallel.sequence=false", "--signals=20"),
    ),
    "kills": ("phi4", "verify", "kills", "--kills=100"),
    "step-time": ("tools.step_time", "--json=benchmarks/step_time.jsonl"),
    "step-time-packed": ("tools.step_time", "--documents=4"),
    "weight-gradients": (
        *("tools.step_time_before", "cc6d39c^", "--after=cc6d39c", "--pairs=40", "--limit=0.97"),
        *("--dtype", "fp32", "bf16", "--tensor", "1", "2"),
        "--json=benchmarks/step_time_before.jsonl",
    ),
    "host-time": ("tools.host_time", "--json=benchmarks/host_time.jsonl"),
    "pts-simulation": ("tools.pts_simulation", "--json=benchmarks/pts_simulation.jsonl"),
    "generation-time": ("tools.generation_time", "--json=benchmarks/generation.jsonl"),
    "post-training": ("tools.post_training", "--json=benchmarks/post_training.jsonl"),
    "post-training-long": (
        *("tools.post_training", "--tasks", "long", "--draw=1"),
        "--json=benchmarks/post_training.jsonl",
    ),
    "fp8": ("tools.prove_fp8", "--json=benchmarks/fp8.jsonl"),
    "fp8-canary": (
        *("tools.fp8_canary", "--steps=150", "--seeds=3", "--pairs=40"),
        "--json=benchmarks/fp8_canary.jsonl",
    ),
    "stragglers": ("tools.prove_stragglers",),
    "tracking": ("tools.prove_tracking", "--json=benchmarks/tracking.jsonl"),
    "serve-load": ("tools.serve_load", "--json=benchmarks/serve_load.jsonl"),
    "slurm": ("tools.slurm_cases", "--json=benchmarks/slurm_cases.jsonl"),
    "sweep": ("tools.sweep_proof", "--json=benchmarks/sweep.jsonl"),
    "kernels": ("phi4_kernels.testing", "numbers"),
    "compile": ("phi4_kernels.testing", "compile"),
}
"""Arguments of `python -m`."""
DEMO_DATA = ROOT / "runs" / "demo" / "data"
NEEDS_DEMO_DATA = ("resume", "fp8", "stragglers", "preempt", "kills", "slurm", "sweep", "tracking")
"""Proofs whose recipe reads what `phi4 data demo` writes."""


def run(name: str, command: tuple[str, ...]) -> dict[str, object]:
    """Run a proof, its output shown as it comes.

    Returns:
        The row: verdict, last line of output, wall and CPU seconds.
    """
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", *command]
    last_line = ""
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            # The frame of a table says nothing.
            last_line = line.strip() if any(map(str.isalnum, line)) else last_line
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "benchmark": "proof",
        "proof": name,
        "command": " ".join(("python", "-m", *command)),
        "passed": process.returncode == 0,
        "last_line": last_line,
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def main() -> int:
    """Command line; exit 1 when the proof fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=PROOFS)
    name = parser.parse_args().name
    if name in NEEDS_DEMO_DATA and not DEMO_DATA.exists():
        subprocess.run([sys.executable, "-m", "phi4", "data", "demo"], cwd=ROOT, check=True)
    # Before the proof, which may append rows of its own to a committed file.
    commit = provenance()["commit"]
    row = run(name, PROOFS[name])
    append_row(ROWS, {"commit": commit, **row})
    return 0 if row["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
