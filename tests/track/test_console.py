"""Plain lines in a file, a bar on a terminal."""

import contextlib
import io
import os
import pty

from phi4.track import ConsoleTracker

METRICS = {
    "loss": 6.21,
    "grad_norm": 1.5,
    "learning_rate": 3e-4,
    "tokens_per_second": 12345.6,
}


def lines_of(seconds_per_step: float, *, resume_step: int = 0) -> list[str]:
    now = [0.0]
    stream = io.StringIO()
    console = ConsoleTracker(10, resume_step, stream, clock=lambda: now[0])
    console.say("layout: TP2 x PP2 [bold]as it is[/bold]")
    console.start({}, [])
    for step in range(resume_step + 1, 11):
        now[0] += seconds_per_step
        rest = {"eta_seconds": 2.0 * (10 - step)}
        console.log(step, METRICS | rest | ({"held_out_loss": 5.5} if step == 7 else {}))
    console.finish("finished")
    return stream.getvalue().splitlines()


def test_slow_steps_get_a_line_each():
    said, *lines = lines_of(1.0)
    assert said == "layout: TP2 x PP2 [bold]as it is[/bold]"
    assert len(lines) == 10
    first = "step 1/10  loss 6.2100  grad norm 1.500  lr 3.00e-04  12,346 tokens/s  eta 0:00:18"
    assert lines[0] == first
    assert "held-out loss 5.5000" in lines[6]


def test_fast_steps_share_a_line_but_evaluation_and_last_step_show():
    _, *lines = lines_of(0.3)
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 5", "step 7", "step 10"]


def test_last_step_is_shown_when_it_is_logged():
    stream = io.StringIO()
    console = ConsoleTracker(2, 0, stream, clock=lambda: 0.0)
    console.log(1, METRICS)
    console.log(2, METRICS)
    # A save of the step is printed after this and before the end.
    assert stream.getvalue().splitlines()[-1].startswith("step 2/2")


def test_step_before_a_failure_is_shown_and_before_a_stop_is_not():
    for status, shown in (("failed", ["step 1", "step 2"]), ("interrupted", ["step 1"])):
        stream = io.StringIO()
        console = ConsoleTracker(10, 0, stream, clock=lambda: 0.0)
        console.log(1, METRICS)
        console.log(2, METRICS)
        console.finish(status)
        assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == shown


def test_lines_go_on_from_the_resumed_step():
    assert lines_of(1.0, resume_step=8)[1].startswith("step 9/10")


def everything_from(terminal: int) -> str:
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    return shown.decode()


def test_terminal_gets_a_bar_and_its_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        console = ConsoleTracker(10, 4, stream)
        console.start({}, [])
        console.log(5, METRICS | {"held_out_loss": 5.5, "eta_seconds": 3725.4})
        console.finish("interrupted")
    shown = everything_from(ours)
    assert "5/10" in shown and "loss 6.2100" in shown and "12,346 tokens/s" in shown
    assert "eta 1:02:05" in shown
    assert "step 5  loss 6.2100  held-out loss 5.5000" in shown.replace("\x1b", "")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_skipped_step_is_said_at_once():
    stream = io.StringIO()
    console = ConsoleTracker(10, 0, stream, clock=lambda: 0.0)
    console.start({}, [])
    console.log(1, METRICS)
    console.log(2, METRICS | {"grad_norm": float("inf"), "skipped": 1.0})

    assert "grad norm inf" in stream.getvalue()
    assert "bad step: weights unchanged" in stream.getvalue()
