"""What people see of a trajectory: colours by p, pivots with their change, a picture."""

import pytest
from rich.console import Console

from phi4.pts.search.rows import PivotMark, PointRow, TrajectoryRow
from phi4.pts.search.show import (
    color_of,
    draw_trajectory,
    ink_of,
    measured_lines,
    shares_behind,
    trajectory_text,
)

BLACK, WHITE = "#000000", "#ffffff"
TEXTS = ["The", " sum", " is", " $", "4", "$\n", "[x]", "你", "."]
ROW = TrajectoryRow(
    trajectory="q7/right",
    question="q7",
    prompt="What is 2 + 2?",
    is_right=True,
    ids=list(range(len(TEXTS))),
    texts=TEXTS,
    log_probs=[-0.1] * len(TEXTS),
    points=[
        PointRow(2, 8, 32, "tree"),
        PointRow(4, 30, 40, "tree"),
        PointRow(5, 0, 0, "tree"),
        PointRow(9, 1, 1, "verdict"),
    ],
    pivots=[PivotMark(3, 0.5), PivotMark(4, -0.75)],
)


def test_tokens_have_the_p_behind_them() -> None:
    assert shares_behind(ROW) == [None, 0.25, 0.25, 0.75, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_colors_go_from_one_end_to_the_other() -> None:
    shares = [i / 20 for i in range(21)]
    colors = [color_of(share) for share in shares]
    assert len(set(colors)) == 6 and colors == sorted(colors, key=colors.index)
    assert color_of(None) not in colors
    assert [ink_of(share) for share in (0.0, 0.5, 1.0, None)] == [WHITE, BLACK, WHITE, BLACK]


def test_text_is_the_answer_with_its_pivots_marked() -> None:
    text = trajectory_text(ROW)
    marked = {3: "[+0.50]", 4: "[-0.75]"}
    assert text.plain == "".join(piece + marked.get(i, "") for i, piece in enumerate(TEXTS))
    bold = [text.plain[span.start : span.end] for span in text.spans if "bold" in str(span.style)]
    assert bold == [" $", "[+0.50]", "4", "[-0.75]"]
    # Markup in an answer is text: nothing of it is lost on a terminal.
    console = Console(width=200, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(text)
    assert "[x]" in captured.get() and "48;2;" in captured.get()


def test_lines_name_what_was_measured() -> None:
    lines = measured_lines(ROW)
    assert len(lines) == 4
    assert lines[0].split() == ["2", "p", "=", "0.25", "8/32", "tree"]
    assert lines[3].split()[-1] == "verdict"


@pytest.mark.slow
def test_picture_is_drawn_of_any_text(tmp_path) -> None:
    out = draw_trajectory(ROW, tmp_path / "picture.png")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert out.stat().st_size > 10_000
