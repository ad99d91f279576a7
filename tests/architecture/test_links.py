"""Links between the Markdown files point to files and headings that exist."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt  # rich brings it
from markdown_it.token import Token

from tests.architecture.test_tracked_files import ROOT, tracked_files

PAGES = [path for path in tracked_files(ROOT) if path.suffix == ".md"]


@cache
def parse(page: Path) -> list[Token]:
    return MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8"))


def links(tokens: list[Token]) -> Iterator[str]:
    """Where links and pictures point."""
    for token in tokens:
        target = token.attrGet("href") or token.attrGet("src")
        if target:
            yield str(target)
        yield from links(token.children or [])


@cache
def anchors(page: Path) -> frozenset[str]:
    """Anchors of the headings, as GitHub makes them."""
    found: set[str] = set()
    tokens = parse(page)
    for opening, heading in pairwise(tokens):
        if opening.type != "heading_open":
            continue
        text = "".join(
            child.content
            for child in heading.children or []
            if child.type in ("text", "code_inline")
        )
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return frozenset(found)


def broken(page: Path) -> list[str]:
    """Links of a page to files or headings that do not exist."""
    found = []
    for link in links(parse(page)):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.exists():
            found.append(f"{link}: no such file")
        elif parts.fragment and target.suffix == ".md" and parts.fragment not in anchors(target):
            found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_point_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_all_pages_are_looked_at() -> None:
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"README.md", "docs/cli.md", "docs/tutorials/slurm.md", "kernels/FACTS.md"} < names


def test_planted_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a b.md").write_text("# One `two`, three_4!\n## Twice\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[1](a%20b.md) [2](a%20b.md#one-two-three_4) [3](#here) [4](https://example.com/x)\n"
        "[5](a%20b.md#twice-1) `[6](none.md)`\n\n```\n[7](none.md)\n```\n\n"
        "| cell |\n|---|\n| [8](none.md) |\n\n[9](a%20b.md#two) [10](#there) ![11](no.png)\n"
    )
    assert broken(page) == [
        "none.md: no such file",
        "a%20b.md#two: no such heading",
        "#there: no such heading",
        "no.png: no such file",
    ]


def test_glossary_says_where_its_terms_are_defined() -> None:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", text, re.M)[1:]
    terms = [term.lower() for term, _, _ in rows]
    assert terms == sorted(set(terms)) and len(terms) >= 25
    places = {place.strip("`") for _, _, place in rows if place.startswith("`")}
    assert [place for place in sorted(places) if not (ROOT / place).is_file()] == []
    # The others are links, which are checked with all links.
    assert all(place.startswith(("`", "[")) for _, _, place in rows)
