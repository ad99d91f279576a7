"""A page in headless Chromium, driven as a user would; needs the package `chromium` of Debian."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.chromium import CHROMIUM, FLAGS
from tests.support.waiting import LONG_SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Page


@contextmanager
def open_page(width: int = 1500, height: int = 1000) -> Iterator["Page"]:
    """An empty page, closed at the end of the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(1000 * LONG_SECONDS)
            yield page
        finally:
            browser.close()
