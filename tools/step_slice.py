"""What the times of a step at two depths say of a layer, of the rest, and of the whole model.

A step's time is taken to be `rest + num_layers * layer`. A layer's part holds its share of the
optimizer too; the rest is embedding, head, loss and their share of the optimizer. What follows for
all 40 layers is one GPU's slice: nothing is sent to another GPU, and whether the layers fit in
memory is not asked. Every function here is arithmetic on measured numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi4.config import ModelConfig
from phi4.model.shape import training_flops_per_token

PEAK_TFLOPS = 989.4
"""Dense bf16 of an H100 or H200 SXM, by the data sheet: what MFU is a fraction of."""
CONDITIONS = "without communication, one GPU's slice, memory ignored"
"""Under which the extrapolation holds; in every row and every line that shows it."""
GOAL, GOAL_SIDE = 1.10, "megatron-core + TE"
"""Tokens per second of ours over those of this side, in the same run, that we aim at."""
_DRAWS = 10_000
Row = dict[str, Any]


@dataclass(frozen=True)
class Depth:
    """What was measured of one side at one number of layers."""

    num_layers: int
    step_ms: Sequence[float]
    peak_gib: float | None
    """Peak memory above what was allocated before the model was built; None on a CPU."""


def mfu(tokens_per_second: float, model: ModelConfig, row_tokens: int) -> tuple[float, float]:
    """Fraction of PEAK_TFLOPS, attention counted causally and in full."""
    flops = training_flops_per_token(model, row_tokens)
    causal, full = (
        tokens_per_second * x / (PEAK_TFLOPS * 1e12) for x in (flops.causal, flops.full)
    )
    return round(causal, 4), round(full, 4)


def slice_columns(
    lower: Depth, upper: Depth, model: ModelConfig, row_tokens: int, step_tokens: int
) -> Row:
    """Return the columns `slice` and `extrapolated` of a row.

    Args:
        lower: fewer layers.
        upper: more layers, everything else alike.
        model: the whole model, whose number of layers is extrapolated to.
        row_tokens: tokens of a row.
        step_tokens: tokens of an optimizer step.

    Returns:
        Times in ms with their 95% bootstrap intervals, memory in GiB. `extrapolated` is None where
        the interval of a layer's time reaches 0: the spread is larger than what a layer costs.

    Raises:
        ValueError: the depths are not two in growing order.
    """
    if lower.num_layers >= upper.num_layers:
        raise ValueError(
            f"depths {lower.num_layers} and {upper.num_layers}; give two, the smaller one first"
        )
    layer, rest = _layer_and_rest(lower, upper, *(np.median(d.step_ms) for d in (lower, upper)))
    random = np.random.default_rng(0)
    layers, rests = _layer_and_rest(lower, upper, *(_medians(d, random) for d in (lower, upper)))
    layer_gib, rest_gib = _memory(lower, upper)
    columns: Row = {
        "num_layers": [lower.num_layers, upper.num_layers],
        "step_ms": [list(lower.step_ms), list(upper.step_ms)],
        "peak_gib": [lower.peak_gib, upper.peak_gib],
        "step_tokens": step_tokens,
        "layer_ms": round(float(layer), 3),
        "layer_ms_95": _interval(layers, 3),
        "rest_ms": round(float(rest), 3),
        "rest_ms_95": _interval(rests, 3),
        "layer_gib": layer_gib,
        "rest_gib": rest_gib,
    }
    if columns["layer_ms_95"][0] <= 0:
        return {"slice": columns, "extrapolated": None}
    rate = step_tokens * 1e3 / (rest + model.num_layers * layer)
    rates = step_tokens * 1e3 / (rests + model.num_layers * layers)
    causal, full = mfu(rate, model, row_tokens)
    whole_gib = None if layer_gib is None else round(rest_gib + model.num_layers * layer_gib, 1)
    extrapolated = {
        "conditions": CONDITIONS,
        "num_layers": model.num_layers,
        "tokens_per_second_per_gpu": round(rate),
        "tokens_per_second_per_gpu_95": [round(x) for x in _interval(rates, 1)],
        "mfu_causal": causal,
        "mfu_full": full,
        "peak_gib": whole_gib,
    }
    return {"slice": columns, "extrapolated": extrapolated}


def with_layers(model: ModelConfig, num_layers: int) -> ModelConfig:
    """Return the same model with another number of layers."""
    return model.model_copy(update={"num_layers": num_layers})


def describe(row: Row) -> str:
    """Return a side's row for the console: as measured, per layer, and for the whole model."""
    if "absent" in row:
        return f"{row['side']}: absent: {row['absent']}"
    memory = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
    lines = [
        f"{row['side']}: {row['tokens_per_second']:,} tokens/s at {row['num_layers']} layers, "
        f"MFU {row['mfu']:.3f} causal, {row['mfu_full']:.3f} full{memory}"
    ]
    if "slice" in row:
        part = row["slice"]
        memory = (
            ""
            if part["layer_gib"] is None
            else f"; {part['layer_gib']:.2f} GiB a layer, {part['rest_gib']:.2f} GiB the rest"
        )
        lines.append(
            f"  a layer {_ms(part, 'layer_ms')}, the rest {_ms(part, 'rest_ms')}, in steps of "
            f"{part['step_tokens']:,} tokens{memory}"
        )
        lines.append(f"  {_describe_whole(row['extrapolated'])}")
    return "\n".join(lines)


def compare(rows: Sequence[Row], ours: str, others: Sequence[str]) -> list[str]:
    """Lines with our speed over that of other sides of the same run, and whether GOAL is met.

    Args:
        rows: rows of one run; sides that are absent or failed have no speed.
        ours: the side that is compared.
        others: the sides that it is compared with.
    """
    speeds = {row["side"]: row for row in rows if "absent" not in row}
    if ours not in speeds:
        return [f"no comparison: {ours} has no speed in this run"]
    lines = []
    for other in others:
        if other not in speeds:
            goal = f"; the goal of {GOAL:.2f}x is not checked" if other == GOAL_SIDE else ""
            lines.append(f"{ours} / {other}: {other} has no speed in this run{goal}")
            continue
        measured = _quotient(speeds[ours], speeds[other])
        lines.append(f"{ours} / {other}: {measured}{_extrapolated(speeds[ours], speeds[other])}")
    return lines


def _quotient(ours: Row, other: Row) -> str:
    ratio = ours["tokens_per_second"] / other["tokens_per_second"]
    return f"{ratio:.2f}x at {ours['num_layers']} layers"


def _extrapolated(ours: Row, other: Row) -> str:
    if not (ours.get("extrapolated") and other.get("extrapolated")):
        return ""
    rates = [row["extrapolated"]["tokens_per_second_per_gpu"] for row in (ours, other)]
    ratio = rates[0] / rates[1]
    text = f", {ratio:.2f}x at {ours['extrapolated']['num_layers']} ({CONDITIONS})"
    if other["side"] == GOAL_SIDE:
        text += f"; goal {GOAL:.2f}x: {'met' if ratio >= GOAL else 'not met'}"
    return text


def _layer_and_rest(
    lower: Depth, upper: Depth, lower_ms: np.ndarray, upper_ms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    layer = (upper_ms - lower_ms) / (upper.num_layers - lower.num_layers)
    return layer, lower_ms - lower.num_layers * layer


def _medians(depth: Depth, random: np.random.Generator) -> np.ndarray:
    draws = random.choice(np.asarray(depth.step_ms), (_DRAWS, len(depth.step_ms)))
    return np.median(draws, axis=1)


def _interval(values: np.ndarray, digits: int) -> list[float]:
    return [round(float(x), digits) for x in np.percentile(values, [2.5, 97.5])]


def _memory(lower: Depth, upper: Depth) -> tuple[float, float] | tuple[None, None]:
    if lower.peak_gib is None or upper.peak_gib is None:
        return None, None
    layer, rest = _layer_and_rest(lower, upper, lower.peak_gib, upper.peak_gib)
    return round(layer, 3), round(rest, 3)


def _ms(part: Row, name: str) -> str:
    low, high = part[f"{name}_95"]
    return f"{part[name]:.2f} ms ({low:.2f} to {high:.2f})"


def _describe_whole(whole: Row | None) -> str:
    if whole is None:
        return "not extrapolated: the spread is larger than the time of a layer"
    low, high = whole["tokens_per_second_per_gpu_95"]
    memory = "" if whole["peak_gib"] is None else f", which would take {whole['peak_gib']:.0f} GiB"
    return (
        f"{whole['num_layers']} layers extrapolated, {whole['conditions']}: "
        f"{whole['tokens_per_second_per_gpu']:,} tokens/s/GPU ({low:,} to {high:,}), "
        f"MFU {whole['mfu_causal']:.3f} causal, {whole['mfu_full']:.3f} full{memory}"
    )
