"""The report of an eventful run: its sections, its charts, and their numbers."""

from pathlib import Path

import pytest
from plotly.graph_objects import Figure

from phi4.rundir.goodput import BUCKETS, goodput_of, spans_of
from phi4.rundir.run_record import read_run
from phi4.track.report import write_report
from phi4.track.report.timeline import timeline_of
from tests.support.recorded_runs import BEGAN_UNIX, eventful_run, write_about, write_samples
from tests.track.page_reader import Page, report_page

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
    return report_page(tmp_path_factory.mktemp("page"), eventful)


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


def test_timeline_has_every_second_of_the_table(eventful: Path) -> None:
    record = read_run(eventful)
    timeline = timeline_of(list(spans_of(record)))
    found = goodput_of(record)
    assert {name: timeline.seconds[name].sum() for name in BUCKETS} == pytest.approx(
        dict(found.seconds), abs=1e-6
    )
    width = found.wall_seconds / (len(timeline.edges) - 1)
    assert sum(timeline.seconds.values()) == pytest.approx(width, abs=1e-6)


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
    found = report_page(tmp_path, eventful, run.run_dir)
    head, *rows = found.tables["overview"]
    assert head[1:] == ["eventful", "other"]
    assert ["steps", "120 of 120", "120 of 120"] in rows
    series = found.series("loss")
    colours = {series[f"{name}: training"]["line"]["color"] for name in ("eventful", "other")}
    assert len(colours) == 2
    assert {"run-0", "run-1"} <= set(found.ids)
