"""The page of a report, and what it holds, read with the standard library."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from phi4.track.report import write_report


class Page(HTMLParser):
    """A page's texts, tables and charts.

    Attributes:
        ids: of its elements.
        tables: rows by the class of the table, head and foot included.
        facts: value by name, of the tiles of a single run.
        captions: of the charts.
        notes: texts of paragraphs.
        links: every attribute that names something to load or go to.
        headings: texts of h1, h2 and h3.
        raw_json: text of the script element that holds the charts.
        charts: what its script draws, by name.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.headings: list[str] = []
        self.facts: dict[str, str] = {}
        self.captions: list[str] = []
        self.notes: list[str] = []
        self._table = self._cell = self._name = ""
        self.raw_json = ""
        self._into: str | None = None
        self.feed(text)
        self.drawing = json.loads(self.raw_json, parse_constant=_refuse)
        self.charts: dict[str, Any] = {one["name"]: one for one in self.drawing["charts"]}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"])
        self.links += [given[key] for key in ("src", "href", "action", "data") if key in given]
        if tag == "table":
            self._table = given["class"]
            self.tables.setdefault(self._table, [])
        elif tag == "tr" and self._table:
            self.tables[self._table].append([])
        elif tag in ("td", "th", "h1", "h2", "h3", "dt", "dd", "figcaption", "p"):
            self._cell = ""
        elif tag == "script":
            self._into = given.get("id", "script")

    def handle_endtag(self, tag: str) -> None:
        text = " ".join(self._cell.split())
        if tag in ("td", "th"):
            self.tables[self._table][-1].append(text)
        elif tag in ("h1", "h2", "h3"):
            self.headings.append(text)
        elif tag == "dt":
            self._name = text
        elif tag == "dd":
            self.facts[self._name] = text
        elif tag == "figcaption":
            self.captions.append(text)
        elif tag == "p":
            self.notes.append(text)
        elif tag == "script":
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into == "charts":
            self.raw_json += data
        elif self._into is None:
            self._cell += data

    def series(self, chart: str) -> dict[str, dict[str, Any]]:
        """Traces of a chart by name."""
        return {trace["name"]: trace for trace in self.charts[chart]["data"]}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def report_page(directory: Path, *runs: Path) -> Page:
    """The report of some runs, written into a directory."""
    text = write_report(runs, directory / "report.html").read_text(encoding="utf-8")
    assert len(text) < 15_000_000
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    return found
