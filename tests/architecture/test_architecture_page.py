"""docs/architecture.md shows what is imported and names what exists."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.architecture.import_graph import Source, read_sources
from tools.package_picture import PAGE, ROOT, pictures, with_pictures

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+\?) \| `(\S+)` \| `(\w+)` \|$", TEXT, re.M)


def test_page_shows_what_is_imported(sources: Sequence[Source]) -> None:
    assert with_pictures(TEXT, sources) == TEXT, "run: make picture"


def test_paths_of_the_page_exist() -> None:
    paths = re.findall(r"`((?:phi4|kernels|tests|tools)/\S+?)`", TEXT)
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize(("question", "path", "name"), ROWS)
def test_answer_to_a_question_defines_what_it_names(question: str, path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if hasattr(node, "name")}
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert name in defined


def test_every_question_has_one_answer() -> None:
    assert len(ROWS) == TEXT.count("? |") == len({question for question, _, _ in ROWS}) > 20


def write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        (
            "phi4/track/__init__.py",
            '"""Track: a "view" of `x`. More."""',
            "A #quot;view#quot; of x",
        ),
        ("phi4/train/x.py", "from phi4.engine import step", "  train --> engine"),
        ("phi4/config/x.py", "def f():\n    import phi4.errors", "  config --> errors"),
        ("phi4/engine/step.py", "import phi4_kernels.rope", "  engine --> phi4_kernels"),
        ("phi4/data/files/a.py", "import phi4.data.vocabulary", "  files --> vocabulary"),
        ("phi4/data/screens/a.py", "", '  screens["<b>screens</b>"]'),
    ],
)
def test_picture_shows_a_planted_package_or_import(
    tmp_path: Path, path: str, text: str, line: str
) -> None:
    write(
        tmp_path,
        {
            "phi4/__init__.py": "",
            "phi4/errors.py": '"""Errors."""',
            "phi4/config/__init__.py": "",
            "phi4/engine/step.py": "",
            "phi4/data/vocabulary/__init__.py": "",
            "phi4/data/files/__init__.py": "",
            "kernels/phi4_kernels/rope/__init__.py": "",
        },
    )
    before = pictures(read_sources(tmp_path))
    write(tmp_path, {path: text})
    assert line not in before and line in pictures(read_sources(tmp_path))


def test_implied_arrow_is_left_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "phi4/train/a.py": "import phi4.engine.b\nimport phi4.config",
            "phi4/engine/b.py": "import phi4.config",
            "phi4/config/__init__.py": "",
        },
    )
    drawn = pictures(read_sources(tmp_path))
    assert "train --> engine" in drawn and "engine --> config" in drawn
    assert "train --> config" not in drawn


def test_page_without_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block from <!-- picture: begin"):
        with_pictures(TEXT.replace("picture: begin", "picture:"), [])
