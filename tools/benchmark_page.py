"""Write BENCHMARKS.md from the rows under benchmarks/, and the floors and picture of the kernels.

`make measured` runs it, a test compares. Floors are arithmetic: they have a page of their own,
kernels/FLOORS.md.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from phi4_kernels.bench import report

from tools.benchmark_lines import Line, Row
from tools.benchmark_sections import CHAPTERS, GPU, Section

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "BENCHMARKS.md"
_HEAD = """# Benchmarks

Generated from the committed rows under [benchmarks/](benchmarks) by `make measured`; do not edit.
Every figure was measured, at the commit of its line. Of each case the newest row is shown, whether
it passed or not. Brackets hold 95% intervals of interleaved pairs where sides are compared. Without
a GPU the machine has 2 cores, which other work may have shared; the rows say how busy it was.

Lower bounds on a kernel's time are arithmetic, not measurements; they are in
[kernels/FLOORS.md](kernels/FLOORS.md).
"""


def rows_of(path: Path) -> list[Row]:
    """The rows of a file, oldest first; none where it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(rows: Iterable[tuple[Line, str]]) -> str:
    """Markdown of lines and their commits; a line without a column has an empty cell there."""
    lines = [line | {"commit": commit} for line, commit in rows]
    names = list(dict.fromkeys(name for line in lines for name in line if name != "commit"))
    cells = [
        [line.get(name, "").replace("|", r"\|") for name in [*names, "commit"]] for line in lines
    ]
    return report.table([*names, "commit"], cells)


def section_text(section: Section, directory: Path, level: str) -> str:
    """Heading, command and table; nothing where the file has no rows."""
    newest = section.newest(rows_of(directory / section.file))
    if not newest:
        return ""
    lines = [(line, row["commit"][:12]) for row in newest for line in section.lines(row)]
    source = f"[{section.file}](benchmarks/{section.file}), written by `{section.command}`."
    return f"\n{level} {section.title}\n\n{section.about} {source}\n\n{table(lines)}"


def page(directory: Path) -> str:
    """BENCHMARKS.md from a directory of rows."""
    parts = [_HEAD]
    gpu = [section_text(section, directory, "###") for section in GPU]
    kernels = rows_of(directory / report.ROWS.name)
    parts += ["\n## On a GPU\n", *gpu, report.measured(kernels)]
    for title, sections in CHAPTERS:
        texts = [section_text(section, directory, "###") for section in sections]
        parts += [f"\n## {title}\n", *texts] if any(texts) else []
    return "".join(parts)


def files() -> list[str]:
    """The files of rows that have a section."""
    chosen = [*GPU, *(section for _, sections in CHAPTERS for section in sections)]
    return sorted([report.ROWS.name, *(section.file for section in chosen)])


def main() -> None:
    """Write the pages and the picture."""
    PAGE.write_text(page(ROOT / "benchmarks"), encoding="utf-8")
    print("wrote", PAGE, *report.write())


if __name__ == "__main__":
    main()
