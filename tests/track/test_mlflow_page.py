"""A run as MLflow's own page shows it in a browser; the pictures are left in build/screenshots/."""

import re
from pathlib import Path

import pytest

from tests.architecture.sizes import ROOT
from tests.support.abouts import begun
from tests.support.browser import open_page
from tests.support.chromium import CHROMIUM
from tests.support.tracked_runs import TrackedDir
from tools.tracking_server import tracking_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH"),
]

PICTURES = ROOT / "build" / "screenshots"
CURVE = ".js-plotly-plot .scatterlayer .trace"


def test_run_stands_among_training_runs_with_its_series(tmp_path: Path) -> None:
    with tracking_server(tmp_path / "server") as server:
        run = TrackedDir(tmp_path / "runs" / "one", num_steps=30, uri=server.uri)
        run.begin()
        begun(run.run_dir)
        run.train(range(1, 31), grad_norm=1.5)
        run.end("finished")
        follower = run.follow()
        follower.describe(is_last=True)
        follower.conclude("finished")
        [address] = re.findall(r"^MLflow: (http\S+/#/\S+)$", "\n".join(run.said), re.MULTILINE)
        with open_page() as page:
            page.goto(address)
            page.get_by_role("link", name="Runs").first.wait_for()
            assert page.get_by_text("Evaluation runs").count() == 0
            page.get_by_text("Finished").first.wait_for()
            page.screenshot(path=PICTURES / "mlflow_run.png")
            page.get_by_role("tab", name="Model metrics").click()
            page.locator(CURVE).nth(1).wait_for(state="attached")
            for name in ("loss", "grad_norm"):
                page.get_by_text(name, exact=True).first.wait_for()
            page.screenshot(path=PICTURES / "mlflow_metrics.png")
