"""Show a trajectory: its text coloured by p, with pivots marked, in a terminal or as a plot.

A token has the colour of p after it, if measured; otherwise that of the last measured token before
it.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from phi4.pts.search.rows import TrajectoryRow

_COLORS = ("#b2182b", "#ef8a62", "#f7d6b0", "#c6dbef", "#67a9cf", "#2166ac")
"""From p = 0 to p = 1; a scale that is readable with colour blindness."""

_LINE_CHARACTERS = 88


def shares_behind(row: TrajectoryRow) -> list[float | None]:
    """Return p after each token; None before the first measured position."""
    measured = {point.position: point.successes / max(point.trials, 1) for point in row.points}
    shares: list[float | None] = []
    last = measured.get(0)
    for position in range(1, len(row.ids) + 1):
        last = measured.get(position, last)
        shares.append(last)
    return shares


def color_of(share: float | None) -> str:
    """Return the colour of a probability; grey if unknown."""
    if share is None:
        return "#d9d9d9"
    return _COLORS[min(int(share * len(_COLORS)), len(_COLORS) - 1)]


def ink_of(share: float | None) -> str:
    """Return the text colour on the colour of a probability: the two ends of the scale are dark."""
    return "#ffffff" if color_of(share) in (_COLORS[0], _COLORS[-1]) else "#000000"


def trajectory_text(row: TrajectoryRow) -> Text:
    """Return the answer in colours, each pivot followed by its change of p in brackets."""
    marks = {pivot.position: pivot.dp_at_confirmation for pivot in row.pivots}
    text = Text()
    for position, (piece, share) in enumerate(zip(row.texts, shares_behind(row), strict=True)):
        style = f"{ink_of(share)} on {color_of(share)}"
        if position in marks:
            text.append(piece, f"bold underline {style}")
            text.append(f"[{marks[position]:+.2f}]", "bold")
        else:
            text.append(piece, style)
    return text


def measured_lines(row: TrajectoryRow) -> list[str]:
    """Return the measurements of p, a line each."""
    lines = []
    for point in row.points:
        share = point.successes / max(point.trials, 1)
        counts = f"{point.successes}/{point.trials}"
        lines.append(f"{point.position:6d}  p = {share:.2f}  {counts:>7}  {point.source}")
    return lines


def draw_trajectory(row: TrajectoryRow, out: Path) -> Path:
    """Plot the answer's tokens in colours, and p along them; return `out` (PNG)."""
    # Drawn on a machine without a display; importing it takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _laid_out(row)
    num_lines = lines[-1][0] + 1
    height = 0.24 * num_lines + 3.2
    figure = Figure(figsize=(10, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    tokens, curve = figure.subplots(
        2, 1, gridspec_kw={"height_ratios": (max(0.24 * num_lines, 0.5), 2.6)}
    )
    _draw_tokens(tokens, row, lines)
    _draw_curve(curve, row)
    with warnings.catch_warnings():
        # Characters missing in the font are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out)
    return out


def _laid_out(row: TrajectoryRow) -> list[tuple[int, int, str, int]]:
    """Lay out pieces of tokens in lines of one width: line, column, text, token."""
    laid: list[tuple[int, int, str, int]] = []
    line, column = 0, 0
    for token, text in enumerate(row.texts):
        for number, part in enumerate(_visible(text).split("\n")):
            if number:
                line, column = line + 1, 0
            if column and column + len(part) > _LINE_CHARACTERS:
                line, column = line + 1, 0
            laid.append((line, column, part, token))
            column += len(part)
    return laid


def _visible(text: str) -> str:
    """Add a mark before a line break, so that a line break token has a colour too."""
    return text.replace("\t", "    ").replace("\n", "↵\n")


def _draw_tokens(axes, row: TrajectoryRow, lines: Sequence[tuple[int, int, str, int]]) -> None:
    from matplotlib.patches import Rectangle

    shares = shares_behind(row)
    marks = {pivot.position: pivot.dp_at_confirmation for pivot in row.pivots}
    for line, column, text, token in lines:
        is_pivot = token in marks
        box = Rectangle(
            (column, line),
            len(text),
            0.92,
            facecolor=color_of(shares[token]),
            edgecolor="black" if is_pivot else "none",
            linewidth=1.4 if is_pivot else 0,
            zorder=2 if is_pivot else 1,
        )
        axes.add_patch(box)
        # Character by character: a font's own width differs from a column's.
        for offset, character in enumerate(text):
            axes.text(
                *(column + offset + 0.5, line + 0.5, character),
                ha="center",
                va="center",
                family="monospace",
                fontsize=8,
                weight="bold" if is_pivot else "normal",
                color=ink_of(shares[token]),
                parse_math=False,
                zorder=3,
            )
    axes.set_xlim(0, _LINE_CHARACTERS)
    axes.set_ylim(lines[-1][0] + 1, 0)
    axes.axis("off")
    verdict = "right" if row.is_right else "wrong"
    axes.set_title(f"{row.trajectory}: {verdict}", loc="left", fontsize=9)


def _draw_curve(axes, row: TrajectoryRow) -> None:
    from matplotlib.patches import Patch

    positions = [point.position for point in row.points]
    shares = [point.successes / max(point.trials, 1) for point in row.points]
    axes.step(positions, shares, where="post", lw=1, color="0.4")
    axes.scatter(
        *(positions, shares), c=[color_of(one) for one in shares], edgecolors="0.3", s=26, zorder=3
    )
    behind = shares_behind(row)
    for pivot in row.pivots:
        axes.axvline(pivot.position + 0.5, color="black", lw=0.8, ls=":")
        share = behind[pivot.position]
        label = f"{row.texts[pivot.position].strip()!s} {pivot.dp_at_confirmation:+.2f}"
        axes.annotate(
            label,
            (pivot.position + 0.5, 1.04),
            ha="center",
            va="bottom",
            rotation=30,
            fontsize=8,
            parse_math=False,
            annotation_clip=False,
        )
        if share is not None:
            axes.plot(pivot.position + 1, share, marker="D", color="black", ms=4, zorder=4)
    axes.set_xlim(0, len(row.ids))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("token")
    axes.set_ylabel("p of a right answer")
    axes.grid(alpha=0.3)
    bounds = [f"{i / len(_COLORS):.2f}" for i in range(len(_COLORS) + 1)]
    handles = [
        Patch(facecolor=color, label=f"{bounds[i]} to {bounds[i + 1]}")
        for i, color in enumerate(_COLORS)
    ]
    axes.legend(handles=handles, title="p", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
