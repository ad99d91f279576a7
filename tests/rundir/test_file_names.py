"""One file spells the names of what lies in a run's directory."""

import ast
from pathlib import Path

from phi4.rundir import names

PRODUCT = Path(names.__file__).parents[1]
NAMES = {value for key, value in vars(names).items() if key.endswith(("_FILE", "_DIR"))}


def spelled(tree: ast.AST) -> set[str]:
    """The names among a file's text constants: alone or at the end of a path.

    A name without a dot, such as stop or attempts, is a common word too: only in a path.
    """
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    parts = [text.rpartition("/") for text in texts if isinstance(text, str)]
    return {word for _, slash, word in parts if slash or "." in word} & NAMES


def test_no_other_file_spells_a_name() -> None:
    assert len(NAMES) > 8
    found = {
        str(path.relative_to(PRODUCT)): spelled(ast.parse(path.read_text(encoding="utf-8")))
        for path in PRODUCT.rglob("*.py")
        if path != Path(names.__file__)
    }
    assert {path: words for path, words in found.items() if words} == {}


def test_spelled_name_is_found() -> None:
    assert spelled(ast.parse('run / "metrics.jsonl"')) == {"metrics.jsonl"}
    assert spelled(ast.parse('f"{run}/checkpoints/latest"')) == {"latest"}
