"""The report of runs that were made up: sections, numbers, and whatever a record may hold."""

import math
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.graph_objects import Figure

from phi4.cli import main
from phi4.rundir.goodput import BUCKETS, goodput_of, spans_of
from phi4.rundir.names import LEDGER_FILE, METRICS_FILE
from phi4.rundir.run_record import read_run
from phi4.rundir.state import Change
from phi4.track.report import colours as palette
from phi4.track.report import write_report
from phi4.track.report.decimate import kept_points
from phi4.track.report.timeline import timeline_of
from tests.support.recorded_runs import (
    BEGAN_UNIX,
    RecordedRun,
    eventful_run,
    write_about,
    write_samples,
    write_state,
)
from tests.track.page_reader import Page

ABOUT = {
    "source_tree": {"commit": "0123456789abcdef0123", "is_dirty": True},
    "layout": "TP 2, PP 2",
    "world_size": 4,
    "kernels": {"rms_norm": "triton"},
    "kernel_reasons": {"rms_norm": "fastest proven"},
    "user": "ada",
    "command": ["phi4", "train", "x.toml"],
}
SAMPLE = {
    "sample": 1,
    "cpu_percent": 50,
    "memory_used_bytes": 2**30,
    "memory_total_bytes": 2**32,
    "network_sent_bytes_per_second": 3e6,
    "gpu_0_utilization_percent": 97,
    "gpu_0_power_watts": 600,
}


def page(tmp_path: Path, *runs: Path) -> Page:
    text = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(text) < 15_000_000
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    return found


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "eventful"
    eventful_run(run).write()
    write_about(run, 1, ABOUT)
    write_about(run, 2, ABOUT)
    write_about(run, 3, ABOUT | {"layout": "TP 1, PP 4"})
    for node in range(10):
        write_samples(run, f"node_{node}", [SAMPLE | {"unix_seconds": BEGAN_UNIX + 5 * node}])
    return run


@pytest.fixture(scope="module")
def shown(eventful: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page(tmp_path_factory.mktemp("page"), eventful)


def test_head_says_what_is_known(shown: Page) -> None:
    facts = shown.facts
    assert (facts["status"], facts["steps"], facts["attempts"]) == ("finished", "120 of 120", "3")
    assert (facts["stage"], facts["host"]) == ("pretrain", "node-2")
    assert facts["git commit"] == "0123456789ab, with changes"
    assert facts["held-out loss"] == "3.4000"


def test_every_section_and_chart_is_there(shown: Page) -> None:
    assert {"overview", "training", "run-0"} <= set(shown.ids)
    tables = ("wall-time", "attempts", "trouble", "checkpoints", "layout", "kernels", "memory")
    assert {*tables, "about"} <= set(shown.tables)
    charts = ("loss", "learning-rate", "grad-norm", "tokens-per-second", "mfu")
    alone = ["timeline", "ledger", "grad-norm", "memory"]
    # Load, network and power of the first machines.
    alone += [f"system-{node}-{unit}" for node in range(8) for unit in range(3)]
    assert set(shown.charts) == {*charts, *(f"run-0-{name}" for name in alone)}
    assert {f"chart-{name}" for name in shown.charts} <= set(shown.ids)


def test_samples_of_a_machine_are_by_unit(shown: Page) -> None:
    load = shown.series("run-0-system-0-0")
    values = {name: trace["y"] for name, trace in load.items()}
    assert values == {"cpu": [50], "memory": [25], "gpu 0 utilization": [97]}
    assert shown.series("run-0-system-0-1")["network sent"]["y"] == [3]
    assert "The first 8 of 10 machines are shown." in shown.notes


def test_plotly_accepts_every_chart(shown: Page) -> None:
    # It raises for a property that no trace has.
    for chart in shown.charts.values():
        assert Figure(data=chart["data"], layout=chart["layout"]).data


def test_loss_has_what_was_undone_and_every_event(shown: Page) -> None:
    series = shown.series("loss")
    assert set(series) == {
        *("training", "held out", "held out: code", "held out: web"),
        *("undone steps", "skipped step", "roll back", "resume"),
    }
    # Steps 31 to 38 before the kill and 61 to 68 before the roll back; the last loss is NaN.
    assert len([y for y in series["undone steps"]["y"] if y is not None]) == 8 + 7
    assert series["undone steps"]["opacity"] < 0.5
    assert [text.split(",")[0] for text in series["roll back"]["text"]] == [
        "rolled back from step 68 to 60"
    ]
    assert len(series["resume"]["x"]) == 2
    assert all(len(one["y"]) == len(one["x"]) for one in series.values())


def test_reader_can_choose_steps_and_time(shown: Page) -> None:
    chart = shown.charts["loss"]
    names = [trace["name"] for trace in chart["data"]]
    xs = chart["xs"][names.index("training")]
    assert xs["step"] == list(range(1, 121))
    assert xs["tokens"] == chart["data"][names.index("training")]["x"]
    wall = goodput_of(read_run(Path(shown.facts["directory"]))).wall_seconds
    assert 0 < xs["seconds"][0] < xs["seconds"][-1] <= wall


def test_wall_time_table_sums_to_the_wall_time(shown: Page, eventful: Path) -> None:
    head, *rows, foot = shown.tables["wall-time"]
    assert head == ["bucket", "seconds", "share"]
    assert sum(float(row[1]) for row in rows) == pytest.approx(float(foot[1]), abs=1e-9)
    assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.05)
    found = goodput_of(read_run(eventful))
    assert float(foot[1]) == pytest.approx(found.wall_seconds, abs=0.06)
    assert {row[0]: float(row[1]) for row in rows} == pytest.approx(
        {name.replace("_", " "): s for name, s in found.seconds.items() if s}, abs=0.06
    )


def test_time_that_nobody_counted_is_a_row(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(3)
    run.clock += 7.0
    run.end()
    run.write()
    rows = {row[0]: row[1] for row in page(tmp_path, tmp_path / "run").tables["wall-time"]}
    assert rows["in no bucket"] == "7.000"


def test_attempts_say_how_they_ended(shown: Page) -> None:
    _, *rows = shown.tables["attempts"]
    assert [row[4] for row in rows] == [
        "killed (taken over by attempt 2)",
        "interrupted, preempted: SIGTERM",
        "finished",
    ]
    assert [row[5] for row in rows] == ["1 to 38", "31 to 81", "82 to 120"]


def test_trouble_and_what_was_done_about_it(shown: Page) -> None:
    _, *rows = shown.tables["trouble"]
    assert rows == [
        ["31 to 38", "attempt 1 ended before they were saved", "8 steps done again"],
        [
            "67 to 68",
            "loss 9, nan; gradient norm 800, inf",
            "skipped 2 updates, then rolled back",
        ],
        [
            "61 to 68",
            "2 bad steps in a row, the last one: gradient norm is inf",
            "rolled back to step 60, steps undone; 64 rows of data skipped",
        ],
    ]


def test_layout_is_listed_where_it_changed(shown: Page) -> None:
    _, *rows = shown.tables["layout"]
    assert rows == [["1", "TP 2, PP 2", "4"], ["3", "TP 1, PP 4", "4"]]
    assert shown.tables["kernels"][1:] == [["1", "rms_norm", "triton", "fastest proven"]]


def test_page_asks_for_nothing(shown: Page, eventful: Path, tmp_path: Path) -> None:
    assert all(link.startswith(("#", "data:,")) for link in shown.links)
    text = write_report([eventful], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert text.count("plotly.js v") == 1
    # A record cannot end the script element that its numbers lie in.
    assert "<" not in shown.raw_json


def test_several_runs_have_a_colour_each(eventful: Path, tmp_path: Path) -> None:
    run = eventful_run(tmp_path / "other", seed=1)
    run.write()
    found = page(tmp_path, eventful, run.run_dir)
    head, *rows = found.tables["overview"]
    assert head[1:] == ["eventful", "other"]
    assert ["steps", "120 of 120", "120 of 120"] in rows
    series = found.series("loss")
    colours = {series[f"{name}: training"]["line"]["color"] for name in ("eventful", "other")}
    assert len(colours) == 2
    assert {"run-0", "run-1"} <= set(found.ids)


def test_html_in_a_record_is_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>&amp;<!--"
    run = RecordedRun(tmp_path / "run", (f"run.name='{name}'",))
    run.start(host="<b>host</b>")
    run.steps(3, **{"data__<i>web</i>": 1.0, "held_out_loss__<u>x</u>": 3.0})
    run.end("failed", reason="<img src=x onerror=alert(2)>")
    run.write()
    found = page(tmp_path, run.run_dir)
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
    found = page(tmp_path, run.run_dir)
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
    found = page(tmp_path, run.run_dir)
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
    found = page(tmp_path, run.run_dir)
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
    found = page(tmp_path, run.run_dir)
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
    series = page(tmp_path, run.run_dir).series("run-0-ledger")
    assert {name: trace["y"] for name, trace in series.items()} == {"a": [0.75], "b": [0.25]}


def test_schedule_changes_are_listed(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(2)
    run.write()
    write_state(run.run_dir, Change(1, "optim.learning_rate", 3e-4, 1e-4), step=2)
    rows = page(tmp_path, run.run_dir).tables["schedule"]
    assert rows[1] == ["1", "optim.learning_rate", "0.0003", "0.0001"]


def test_long_run_is_decimated_and_says_so(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.steps(7_000, 1.0)
    run.lines[1_234]["loss"] = 77.0
    run.end()
    run.write()
    found = page(tmp_path, run.run_dir)
    every = found.series("loss")["training, every step"]
    assert len(every["y"]) <= 5_000
    assert max(every["y"]) == 77.0
    assert "training, mean of 46 steps" in found.series("loss")
    assert any(note.startswith("Decimated: up to") for note in found.notes)
    # One outlier does not flatten the curve.
    assert found.charts["loss"]["layout"]["yaxis"]["range"][1] < 10


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=400), st.integers(4, 60))
def test_decimation_keeps_extremes_and_ends(values: list[float], limit: int) -> None:
    array = np.array(values)
    kept = kept_points(array, limit)
    assert len(kept) <= limit
    assert list(kept) == sorted(set(kept.tolist()))
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    assert (array[kept].min(), array[kept].max()) == (array.min(), array.max())
    num_bins = (limit - 2) // 2
    if len(values) > limit:
        # No neighbours are further apart than two bins.
        assert np.diff(kept).max() <= 2 * math.ceil(len(values) / num_bins)


def test_timeline_has_every_second_of_the_table(eventful: Path) -> None:
    record = read_run(eventful)
    timeline = timeline_of(list(spans_of(record)))
    found = goodput_of(record)
    assert {name: timeline.seconds[name].sum() for name in BUCKETS} == pytest.approx(
        dict(found.seconds), abs=1e-6
    )
    width = found.wall_seconds / (len(timeline.edges) - 1)
    assert sum(timeline.seconds.values()) == pytest.approx(width, abs=1e-6)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("background", palette.BACKGROUNDS)
def test_colours_stand_out_on_light_and_dark(background: str) -> None:
    for colour in (*palette.RUNS, *palette.BUCKETS.values(), *palette.EVENTS.values()):
        low, high = sorted((luminance(colour), luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 3.0, colour


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
