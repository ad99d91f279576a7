"""Fill README's table of measured facts from the newest committed rows under benchmarks/.

`make measured` writes it; a test compares. A fact without a row is left out, not filled in by hand.
"""

import json
from collections.abc import Callable
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import Any

from tools.marked_block import replace_block
from tools.post_training_table import readme_line

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
Row = dict[str, Any]


def _demo(row: Row) -> tuple[str, str]:
    result = (
        f"{row['seconds']} s for {row['steps']} steps, a resumption in another layout, text and "
        f"parity; held-out loss {row['held_out_nats_below_unigram']} nats below the unigram entropy"
    )
    return "`make demo` after installation", result


def at_most(number: float) -> str:
    """Two digits of a positive number, rounded up: a bound that holds."""
    digits = Context(prec=2, rounding=ROUND_CEILING)
    return f"{digits.create_decimal_from_float(number):.1e}"


def _parity(row: Row) -> tuple[str, str]:
    result = (
        f"{len(row['layouts'])} layouts, {row['steps']} steps in fp32: loss within "
        f"{at_most(row['worst_loss_error'])} of the loss, the worst tensor within "
        f"{at_most(row['worst_parameter_error'])}"
    )
    return "parity with one process (`phi4 verify parity`)", result


def _step_time(row: Row) -> tuple[str, str]:
    low, high = row["ratio_95"]
    result = (
        f"{row['ratio']:.2f} x a plain transformers loop ({low:.2f} to {high:.2f}, "
        f"{row['pairs']} interleaved pairs)"
    )
    return "step time, one process, one thread (`tools/step_time.py`)", result


def _decode_step(row: Row) -> tuple[str, str]:
    parts = []
    for rows, step in row["step"].items():
        low, high = step["cpu_ratio_95"]
        parts.append(f"{step['cpu_ratio']:.2f} x at batch {rows} ({low:.2f} to {high:.2f})")
    result = f"{', '.join(parts)}; {row['pairs']} interleaved pairs"
    return (
        "CPU time of a decode step over transformers' `generate` (`make bench-generation`)",
        result,
    )


def _samples(row: Row) -> tuple[str, str]:
    parts = [
        f"{case['cpu_speedup']:.1f} times faster with {num_new} new tokens each "
        f"({case['kv_bytes'] / 1e6:.1f} MB of keys and values instead of "
        f"{case['kv_bytes_of_separate_sequences'] / 1e6:.1f})"
        for num_new, case in row["samples"].items()
    ]
    what = (
        f"{row['num_samples']} samples of a {row['prefix_tokens']}-token prompt, compared with "
        "transformers' `num_return_sequences`"
    )
    return what, f"{', '.join(parts)}, in CPU time"


def _start_up(row: Row) -> tuple[str, str]:
    result = f"{row['seconds']:.2f} s and {row['resident_mb']:.0f} MB above the imports"
    return f"first batch of {row['what']} (`tools/data_startup.py`)", result


def _loader(row: Row) -> tuple[str, str]:
    result = (
        f"{row['tokens_per_second'] / 1e6:.0f}M tokens/s by the clock, "
        f"{row['tokens_per_cpu_second'] / 1e6:.0f}M per CPU second"
    )
    return f"{row['what']} (`tools/data_startup.py`)", result


def _tokenize(row: Row) -> tuple[str, str]:
    low, high = row["phi4_over_bare_95"]
    result = (
        f"{row['phi4_over_bare']:.2f} x bare tiktoken, files included ({low:.2f} to {high:.2f}, "
        f"{row['rounds']} rounds)"
    )
    size = f"{row['megabytes']} MB on {row['cores_used']} cores"
    return f"`phi4 data tokenize`, {size} (`tools/tokenize_speed.py`)", result


def _one_forward(row: Row) -> tuple[str, str]:
    low, high = row["ratio_95"]
    what = (
        f"DPO step of {row['pivots_per_trajectory']} pivots per trajectory in one forward, one "
        "process, one thread (`tools/dpo_one_forward.py`)"
    )
    result = (
        f"{row['ratio']:.2f} x a step with two sequences per pivot ({low:.2f} to {high:.2f}, "
        f"{row['pairs']} interleaved pairs)"
    )
    return what, result


_OURS, _PLAIN, _LIGER = "triton, csrc optimizer", "plain torch", "transformers + liger"
_AGAINST = {
    "megatron-core + TE": "megatron-core with Transformer Engine",
    "megatron-core": "megatron-core",
    _PLAIN: "the same engine in plain torch",
    _LIGER: "transformers with Liger",
}


def _gpu_runs(rows: list[Row]) -> list[Row]:
    """Return a row per run of `tools/gpu_step_time.py`, which writes one per side.

    Rows name their run; those of before name none, and ours is the first side of each run.
    """
    runs: dict[str, Row] = {}
    unnamed = 0
    for row in rows:
        unnamed += "run" not in row and row["side"] == _OURS
        run = runs.setdefault(row.get("run", str(unnamed)), {"sides": {}})
        if "absent" not in row:
            run["commit"] = row["commit"]
            run["sides"][row["side"]] = row
    return list(runs.values())


def _extrapolated(ours: Row) -> str:
    whole = ours.get("extrapolated")
    if not whole:
        return ""
    low, high = whole["tokens_per_second_per_gpu_95"]
    return (
        f"{whole['num_layers']} layers extrapolated from {ours['slice']['num_layers'][0]} and "
        f"{ours['slice']['num_layers'][1]}, {whole['conditions']}: "
        f"{whole['tokens_per_second_per_gpu']:,} tokens/s ({low:,} to {high:,}), MFU "
        f"{whole['mfu_causal']:.3f} causal, {whole['mfu_full']:.3f} full; "
    )


def _gpu_step_time(run: Row) -> tuple[str, str]:
    ours = run["sides"][_OURS]
    compared = [
        f"{ours['tokens_per_second'] / other['tokens_per_second']:.2f} x {name} "
        f"({other['tokens_per_second']:,}, {other['mfu']:.3f}, {other['peak_gib']:.0f} GiB)"
        for name, other in ((_AGAINST[side], run["sides"].get(side)) for side in _AGAINST)
        if other
    ]
    what = (
        f"training on one {ours['device']}, Triton kernels and csrc optimizer, "
        f"{ours['num_layers']} layers of phi-4 with its whole vocabulary, rows of "
        f"{ours['row_tokens']:,} (`tools/gpu_step_time.py`)"
    )
    result = (
        f"{ours['tokens_per_second']:,} tokens/s, MFU {ours['mfu']:.3f}, "
        f"{ours['peak_gib']:.0f} GiB; {_extrapolated(ours)}{', '.join(compared)}, whose weights "
        "and moments are bf16 where ours are fp32"
    )
    return what, result


def _post_training_run(rows: list[Row]) -> list[Row]:
    """Return all rows as one; none without figures of the short task."""
    line = readme_line(rows)
    return [{"line": line, "commit": line[2]}] if line else []


FACTS: tuple[tuple[str, Callable[[Row], bool], Callable[[Row], tuple[str, str]]], ...] = (
    ("demo.jsonl", lambda row: True, _demo),
    ("parity.jsonl", lambda row: row["passed"], _parity),
    (
        "step_time.jsonl",
        lambda row: row["documents_per_row"] == 1 and row["num_key_value_heads"] == 2,
        _step_time,
    ),
    (
        "gpu_step_time.jsonl",
        lambda run: {_OURS, _PLAIN, _LIGER} <= run["sides"].keys(),
        _gpu_step_time,
    ),
    ("dpo_one_forward.jsonl", lambda row: True, _one_forward),
    ("post_training.jsonl", lambda row: True, lambda row: row["line"][:2]),
    ("generation.jsonl", lambda row: True, _decode_step),
    ("generation.jsonl", lambda row: True, _samples),
    ("data_startup.jsonl", lambda row: row["case"] == "blend", _start_up),
    ("data_startup.jsonl", lambda row: row["case"] == "throughput", _loader),
    ("data_tokenize.jsonl", lambda row: row["cores_used"] == row["machine_cores"], _tokenize),
)
_GROUPED = {"gpu_step_time.jsonl": _gpu_runs, "post_training.jsonl": _post_training_run}
"""Files of which a fact is made of several rows."""


def table(directory: Path) -> str:
    """Return the table of all facts that have a row, as Markdown."""
    lines = ["| what | result | commit |", "|---|---|---|"]
    for name, counts, describe in FACTS:
        path = directory / name
        rows = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        )
        rows = _GROUPED.get(name, list)(rows)
        rows = [row for row in rows if counts(row)]
        if rows:
            what, result = describe(rows[-1])
            lines.append(f"| {what} | {result} | {rows[-1]['commit']} |")
    return "\n".join(lines)


def with_table(readme: str, directory: Path) -> str:
    """README's text with the table in its block."""
    return replace_block(readme, "measured", table(directory))


def main() -> None:
    """Write README."""
    README.write_text(with_table(README.read_text(), ROOT / "benchmarks"))


if __name__ == "__main__":
    main()
