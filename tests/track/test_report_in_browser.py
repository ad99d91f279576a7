"""The report of a real run that was killed, resumed and rolled back, as a browser shows it.

The pictures are left in build/screenshots/.
"""

import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest

from phi4.engine.engine import Engine
from phi4.rundir.goodput import goodput_of
from phi4.rundir.run_record import read_run
from phi4.track.report import write_report
from tests.architecture.sizes import ROOT
from tests.support.chromium import CHROMIUM, dump_dom, screenshot
from tests.support.guarded_runs import Poison, RunPlan, start, write_source
from tests.support.ranks import RankError, run_ranks
from tests.support.recorded_runs import eventful_run
from tests.track.page_reader import Page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH"),
]

PICTURES = ROOT / "build" / "screenshots"
RECIPE = (
    *("run.steps=40", "checkpoint.every=4", "evaluation.every=10", "evaluation.batches=1"),
    "data.held_out=[{name='a', path='tokens'}]",
)
WATCHED = """<head><script>
addEventListener("securitypolicyviolation",
  (event) => { document.documentElement.dataset.refused = event.blockedURI; });
addEventListener("error", (event) => { document.documentElement.dataset.error = event.message; });
</script>"""


class Killed:
    """What happens to the first attempt."""

    def __call__(self, engine: Engine) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Drawn(HTMLParser):
    """What a browser made of a page.

    Attributes:
        root: attributes of the html element.
        charts: by name, the classes and texts within its element.
    """

    def __init__(self, dom: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root: dict[str, str | None] = {}
        self.charts: dict[str, tuple[list[str], list[str]]] = {}
        self._chart: str | None = None
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "html":
            self.root = given
        name = given.get("id") or ""
        if name.startswith("chart-"):
            self._chart = name.removeprefix("chart-")
            self.charts[self._chart] = ([], [])
        elif self._chart:
            classes = (given.get("class") or "").split()
            # A path without a way is a curve that was not drawn.
            if tag != "path" or given.get("d"):
                self.charts[self._chart][0].extend(classes)

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self._chart = None

    def handle_data(self, data: str) -> None:
        if self._chart:
            self.charts[self._chart][1].append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed after step 11, resumed from step 8, rolled back from step 19, finished."""
    root = tmp_path_factory.mktemp("real")
    write_source(root)
    with pytest.raises(RankError, match="died of signal 9"):
        run_ranks(1, start, root, RunPlan("run", RECIPE, at_step=(11, Killed())))
    [ended] = run_ranks(1, start, root, RunPlan("run", RECIPE, Poison((range(18, 20),), "nan")))
    assert ended.how == "ended after step 40"
    return root / "run"


def drawn(html: Path) -> Drawn:
    """The page in a browser, with what it was refused and what failed noted."""
    watched = html.with_name("watched.html")
    text = html.read_text(encoding="utf-8")
    watched.write_text(text.replace("<head>", WATCHED, 1), encoding="utf-8")
    return Drawn(dump_dom(watched))


def test_real_run_is_drawn_whole(run: Path, tmp_path: Path) -> None:
    html = write_report([run], tmp_path / "report.html")
    page, found = Page(html.read_text(encoding="utf-8")), drawn(html)
    assert found.root["data-drawn"] == str(len(page.charts))
    assert {"data-refused", "data-error"}.isdisjoint(found.root)
    for name, chart in page.charts.items():
        classes, texts = found.charts[name]
        assert "main-svg" in classes, name
        kinds = {"scatter": "trace", "bar": "point"}
        assert {kinds[trace["type"]] for trace in chart["data"]} <= set(classes), name
        if len(chart["data"]) > 1:
            assert {trace["name"] for trace in chart["data"]} <= set(texts), name
    classes, _ = found.charts["loss"]
    assert "js-line" in classes
    names = set(page.series("loss"))
    assert {"training", "held out", "undone steps", "skipped step", "roll back", "resume"} <= names
    screenshot(html, PICTURES / "report.png")
    dark = "--blink-settings=preferredColorScheme=0"
    screenshot(html, PICTURES / "report_dark.png", dark)
    screenshot(html, PICTURES / "report_narrow.png", size=(480, 6000))


def test_numbers_of_the_real_run(run: Path, tmp_path: Path) -> None:
    page = Page(write_report([run], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert (page.facts["status"], page.facts["steps"]) == ("finished", "40 of 40")
    _, *attempts = page.tables["attempts"]
    assert [row[4] for row in attempts] == ["killed (taken over by attempt 2)", "finished"]
    _, lost, skipped, back = page.tables["trouble"]
    assert lost[0] == "9 to 11" and lost[2] == "3 steps done again"
    assert skipped[0] == "18 to 19"
    assert back[0] == "17 to 19" and back[2].startswith("rolled back to step 16")
    _, *rows, foot = page.tables["wall-time"]
    assert sum(float(row[1]) for row in rows) == pytest.approx(float(foot[1]), abs=1e-6)
    wall = goodput_of(read_run(run)).wall_seconds
    assert float(foot[1]) == pytest.approx(wall, abs=0.001)
    _, *saves = page.tables["checkpoints"]
    assert [row[0] for row in saves] == [f"{step}" for step in range(4, 41, 4)]
    assert all(re.fullmatch(r"[0-9a-f]{12}", row[-1]) for row in saves)


def test_runs_side_by_side_are_drawn(run: Path, tmp_path: Path) -> None:
    runs = [eventful_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    html = write_report([one.write() for one in runs], tmp_path / "report.html")
    found = drawn(html)
    assert {"data-refused", "data-error"}.isdisjoint(found.root)
    _, texts = found.charts["loss"]
    assert {"a: training", "b: training", "a: held out", "b: held out"} <= set(texts)
    screenshot(html, PICTURES / "report_of_two.png", size=(1400, 6000))


def test_reader_changes_the_axis(tmp_path: Path) -> None:
    html = write_report([eventful_run(tmp_path / "run").write()], tmp_path / "report.html")
    text = html.read_text(encoding="utf-8")
    click = """<script>
    const look = setInterval(() => {
      if (!document.documentElement.dataset.drawn) return;
      clearInterval(look);
      document.querySelector("input[value=seconds]").click();
    }, 50);
    </script></body>"""
    html.write_text(text.replace("</body>", click), encoding="utf-8")
    _, texts = drawn(html).charts["loss"]
    assert "minutes since the first start" in texts and "tokens" not in texts
