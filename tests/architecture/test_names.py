"""No file is named after everything: what cannot be named by what it does is two things."""

from pathlib import Path

import pytest

from tests.architecture.sizes import ROOT

FOLDERS = ("phi4", "kernels", "tools", "tests")
VAGUE = {"util", "utils", "manager", "managers", "helper", "helpers"}


def vague_names(root: Path) -> list[str]:
    """Python files and their folders that have a vague word in their name."""
    files = (file for folder in FOLDERS for file in sorted((root / folder).glob("**/*.py")))
    names = (file.relative_to(root).with_suffix("") for file in files)
    return [
        name.as_posix()
        for name in names
        if any(VAGUE & set(part.lower().split("_")) for part in name.parts)
    ]


def test_no_file_has_a_vague_name() -> None:
    assert vague_names(ROOT) == []


@pytest.mark.parametrize(
    "name",
    ["phi4/data/utils", "phi4/train/run_manager", "tests/helpers/ranks", "kernels/x/helper"],
)
def test_planted_name_is_found(tmp_path: Path, name: str) -> None:
    for path in (f"{name}.py", "phi4/data/utility.py", "phi4/managed.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert vague_names(tmp_path) == [name]
