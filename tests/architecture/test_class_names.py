"""A class name has one meaning: whoever reads `Plan` need not ask which."""

import ast
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.architecture.import_graph import Source, read_sources


def shared_names(sources: Sequence[Source]) -> list[str]:
    """Names of top-level classes, private ones too, that several files define, with the files."""
    files: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef):
                files[node.name].append(source.path)
    return [f"{name}: {', '.join(paths)}" for name, paths in sorted(files.items()) if paths[1:]]


def test_no_class_name_has_two_meanings(sources: Sequence[Source]) -> None:
    assert shared_names(sources) == []


def test_planted_namesakes_are_found(tmp_path: Path) -> None:
    for path, text in {
        "phi4/a.py": "class Plan:\n    class Row: ...\nclass _Run: ...\nclass A: ...",
        "phi4/b/c.py": "def f():\n    class A: ...\nclass Row: ...\nclass _Run: ...",
        "kernels/phi4_kernels/d.py": "class Plan: ...\nclass B: ...",
        "tests/e.py": "class B: ...",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert shared_names(read_sources(tmp_path)) == [
        "Plan: kernels/phi4_kernels/d.py, phi4/a.py",
        "_Run: phi4/a.py, phi4/b/c.py",
    ]
