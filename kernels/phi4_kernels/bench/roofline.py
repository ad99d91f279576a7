"""The roofline plot: achieved rate over arithmetic intensity, with the ceilings of the same run."""

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the newest rows of the device that was measured last.

    Args:
        rows: as in benchmarks/kernels.jsonl, at least one.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    device = rows[-1]["device"]
    mine = [row for row in rows if row["device"] == device]
    bandwidth, peak = mine[-1]["copy_bytes_per_second"], mine[-1]["matmul_flops_per_second"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    # rate <= min(peak, bandwidth * intensity); the lines meet at peak / bandwidth
    corners = (0.1, peak / bandwidth, 1e4)
    axes.plot(corners, [min(peak, bandwidth * x) / 1e12 for x in corners], color="black")
    for provider in sorted({row["provider"] for row in mine}):
        points = [row for row in mine if row["provider"] == provider]
        intensity = [row["flops"] / row["bytes"] for row in points]
        rate = [row["flops"] / row["p50_us"] / 1e6 for row in points]
        axes.scatter(intensity, rate, s=18, label=provider)
    axes.set(xscale="log", yscale="log", title=f"{device}: copy and bf16 matmul ceilings")
    axes.set(xlabel="operations per byte of least traffic", ylabel="TFLOP/s")
    axes.legend()
    figure.savefig(path, dpi=120)
