"""A page in headless Chromium: what its script made of it, and a picture."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.waiting import LONG_SECONDS

CHROMIUM = shutil.which("chromium")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # Only files and addresses of this machine can be reached, whatever is asked for.
    *("--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)
_BUDGET_MS = 20_000
"""Of the page's own clock, which does not wait for the machine."""


def dump_dom(page: Path) -> str:
    """The page's elements once its script came to rest."""
    return _run(page, "--dump-dom")


def screenshot(page: Path, out: Path, *flags: str, size: tuple[int, int] = (1400, 3600)) -> Path:
    """A picture of the page; returns `out` (PNG)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _run(page, f"--screenshot={out}", f"--window-size={size[0]},{size[1]}", *flags)
    return out


def _run(page: Path, *flags: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        own = (f"--user-data-dir={profile}", f"--virtual-time-budget={_BUDGET_MS}")
        command = [str(CHROMIUM), *FLAGS, *own, *flags, page.resolve().as_uri()]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LONG_SECONDS, check=False
        )
    assert done.returncode == 0, done.stderr
    return done.stdout
