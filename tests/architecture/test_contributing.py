"""CONTRIBUTING.md names the packages, files and environment variables that there are."""

import ast
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

import pytest

from tests.architecture.import_graph import Source, read_sources
from tests.architecture.sizes import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|RANK")


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def variables(source: Source) -> Iterator[str]:
    """Names that a file looks up or sets in an environment, where it spells them out."""
    named = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(source.tree)}
    for node in ast.walk(source.tree) if "environ" in named else ():
        match node:
            case ast.Call(args=arguments) if "environ" in ast.unparse(node):
                yield from _names(arguments)
            case ast.Subscript(value=value, slice=key) if "environ" in ast.unparse(value):
                yield from _names([key])
            case ast.Compare(left=key, comparators=[value]) if "environ" in ast.unparse(value):
                yield from _names([key])


def _names(nodes: Sequence[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and VARIABLE.fullmatch(str(node.value)):
            yield str(node.value)


def unknown_variables(sources: Sequence[Source], page: str) -> list[str]:
    """Variables of phi4/ and kernels/ that a table of names does not have."""
    known = re.findall(r"`([A-Z0-9_*]+)`", page)
    return sorted(
        {
            f"{source.path}: {name}"
            for source in sources
            for name in variables(source)
            if not any(fnmatch(name, pattern) for pattern in known)
        }
    )


def test_environment_variables_are_in_the_table(sources: Sequence[Source]) -> None:
    assert len([name for source in sources for name in variables(source)]) > 20
    assert unknown_variables(sources, section("Environment variables")) == []


@pytest.mark.parametrize(
    "line",
    [
        "os.environ.get('A_B', '')",
        "os.environ['A_B']",
        "'A_B' in environ",
        "_integer(environ, 'A_B')",
        "os.environ.setdefault('A_B', '1')",
    ],
)
def test_planted_variable_is_found(tmp_path, line: str) -> None:
    (tmp_path / "phi4").mkdir()
    (tmp_path / "phi4/x.py").write_text(line)
    (tmp_path / "kernels").mkdir()
    planted = read_sources(tmp_path)
    assert unknown_variables(planted, "| `A_C` |") == ["phi4/x.py: A_B"]
    assert unknown_variables(planted, "| `A_*` |") == []


def test_every_package_has_a_row() -> None:
    rows = re.findall(r"^\| `(\S+/)` \| ", section("A tour of the packages"), re.M)
    packages = {f"phi4/{path.parent.name}/" for path in (ROOT / "phi4").glob("*/__init__.py")}
    assert {row for row in rows if row.startswith("phi4/")} == packages
    assert [row for row in rows if not (ROOT / row).is_dir()] == []


def test_files_that_the_page_names_exist() -> None:
    named = re.findall(r"`((?:phi4|kernels|tests|tools|examples|docs|csrc)/[\w./-]+)`", PAGE)
    # An example of the page, which a test of its own writes.
    made = {"phi4/stages/focal.py"}
    assert [name for name in sorted({*named} - made) if not (ROOT / name).exists()] == []
    # Every test of the table, and none but tests.
    tests = re.findall(r"`(tests/\S+\.py)`", section("Checked by tests"))
    assert len(tests) == len(set(tests)) > 15
