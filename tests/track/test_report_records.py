"""Reports of records that hold little, anything at all, or what cannot be drawn or read."""

import math
import os
from pathlib import Path

import msgspec
import pytest

from phi4.cli import main
from phi4.rundir.names import LEDGER_FILE, METRICS_FILE
from phi4.rundir.state import Change
from tests.support.recorded_runs import BEGAN_UNIX, RecordedRun, write_state
from tests.track.page_reader import report_page


def test_time_that_nobody_counted_is_a_row(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(3)
    run.clock += 7.0
    run.end()
    run.write()
    rows = {row[0]: row[1] for row in report_page(tmp_path, tmp_path / "run").tables["wall-time"]}
    assert rows["in no bucket"] == "7.000"


def test_html_in_a_record_is_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>&amp;<!--"
    run = RecordedRun(tmp_path / "run", (f"run.name='{name}'",))
    run.start(host="<b>host</b>")
    run.steps(3, **{"data__<i>web</i>": 1.0, "held_out_loss__<u>x</u>": 3.0})
    run.end("failed", reason="<img src=x onerror=alert(2)>")
    run.write()
    found = report_page(tmp_path, run.run_dir)
    assert found.headings[0] == name
    assert found.facts["host"] == "<b>host</b>"
    assert found.facts["status"] == "failed: <img src=x onerror=alert(2)>"
    # plotly reads some HTML in texts.
    assert "held out: &lt;u&gt;x&lt;/u&gt;" in found.series("loss")
    assert "&lt;i&gt;web&lt;/i&gt;" in found.series("run-0-ledger")


@pytest.mark.parametrize("steps", [0, 1])
def test_run_that_just_began(steps: int, tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(steps, eta_seconds=3_720.0)
    run.write()
    found = report_page(tmp_path, run.run_dir)
    # Its file was written just now.
    assert found.facts["status"] == ("running, 1 h 02 min left" if steps else "running")
    assert found.facts["steps"] == f"{steps} of 100"
    assert ("loss" in found.charts) == bool(steps)


def test_run_that_was_killed_with_its_launcher(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(5)
    run.write()
    attempt = tmp_path / "run/attempts/0000001.json"
    os.utime(attempt, (BEGAN_UNIX, BEGAN_UNIX))
    found = report_page(tmp_path, run.run_dir)
    assert found.facts["status"].startswith("killed or lost: no sign of life since 2026-09-21")


def test_run_of_an_earlier_version(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(5)
    run.end()
    of_now = ("unix_seconds", "attempt", "seconds/step", "seconds/data", "seconds/start")
    run.lines = [{k: v for k, v in one.items() if k not in of_now} for one in run.lines]
    fields = {"outcome": "", "started_unix": 0.0, "ended_unix": 0.0, "seconds": {}}
    run.attempts[1] = msgspec.structs.replace(run.attempts[1], **fields)
    run.write()
    found = report_page(tmp_path, run.run_dir)
    assert found.facts["wall time"] == found.facts["goodput"] == "not recorded"
    assert found.facts["status"] == "ended; version 0.1 did not record how"
    assert "wall-time" not in found.tables
    assert found.series("loss")["training"]["y"]


def test_losses_that_are_not_finite_break_no_chart(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    for loss in (3.0, math.nan, math.inf, -math.inf, 2.0):
        run.step(loss=loss, grad_norm=math.nan, skipped=float(not math.isfinite(loss)))
    run.step(loss=math.nan)
    run.write()
    found = report_page(tmp_path, run.run_dir)
    assert found.series("loss")["training"]["y"] == [3.0, 2.0]
    assert found.facts["final loss"] == "nan"
    assert "4 losses are NaN or infinite: no point." in found.notes


def test_fractions_come_from_the_ledger_where_no_line_has_them(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(2)
    run.write()
    counts = [{"step": 1, "loss_tokens/a": 30, "loss_tokens/b": 10}, {"step": 2}]
    text = "".join(f"{msgspec.json.encode(line).decode()}\n" for line in counts)
    (run.run_dir / LEDGER_FILE).write_text(text + '{"step": 3, "loss_t', encoding="utf-8")
    series = report_page(tmp_path, run.run_dir).series("run-0-ledger")
    assert {name: trace["y"] for name, trace in series.items()} == {"a": [0.75], "b": [0.25]}


def test_schedule_changes_are_listed(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(2)
    run.write()
    write_state(run.run_dir, Change(1, "optim.learning_rate", 3e-4, 1e-4), step=2)
    rows = report_page(tmp_path, run.run_dir).tables["schedule"]
    assert rows[1] == ["1", "optim.learning_rate", "0.0003", "0.0001"]


def test_long_run_is_decimated_and_says_so(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(7_000, 1.0)
    run.lines[1_234]["loss"] = 77.0
    run.end()
    run.write()
    found = report_page(tmp_path, run.run_dir)
    every = found.series("loss")["training, every step"]
    assert len(every["y"]) <= 5_000
    assert max(every["y"]) == 77.0
    assert "training, mean of 46 steps" in found.series("loss")
    assert any(note.startswith("Decimated: up to") for note in found.notes)
    # One outlier does not flatten the curve.
    assert found.charts["loss"]["layout"]["yaxis"]["range"][1] < 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "none does not exist; give the directory of a run (run.dir)"),
        (["file"], "file is a file; give the directory of a run (run.dir)"),
        (
            ["."],
            "is not a run: it has no config.toml; give the directory of a run (run.dir), for ex",
        ),
        (["run", "./run"], "a run is given twice; give each run's directory once"),
        (["run", "--out", "run"], "run"),
    ],
)
def test_wrong_path_is_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.write()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["report", *words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_damaged_line_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.write()
    (tmp_path / "run" / METRICS_FILE).write_text("what?\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "run")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{METRICS_FILE}:1 is not the JSON object of a step" in line
