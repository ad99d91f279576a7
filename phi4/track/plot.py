"""The loss curve of a run as a picture, drawn from metrics.jsonl."""

from pathlib import Path

from phi4.rundir.step_log import read_metrics


def draw_losses(metrics: Path, out: Path) -> Path:
    """Draw training and held-out loss over tokens; returns `out` (PNG).

    Raises:
        DataError: the metrics file is missing or damaged.
    """
    # Drawn on a machine without a display; importing it costs half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(
        [s["consumed_tokens"] for s in steps], [s["loss"] for s in steps], lw=1, label="training"
    )
    for key in sorted({key for s in steps for key in s if key.startswith("held_out_loss")}):
        points = [(s["consumed_tokens"], s[key]) for s in steps if key in s]
        label = key.replace("held_out_loss", "held out").replace("/", ": ")
        axes.plot(*zip(*points, strict=True), "o--", ms=4, lw=1, label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out)
    return out
