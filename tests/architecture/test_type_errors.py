"""The types are held to the committed numbers of errors, which can only fall."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tools import check_types

FOUND = """\
phi4/a.py:3: error: Incompatible return value type (got "int", expected "str")  [return-value]
phi4/a.py:9:5: error: Name "x" is not defined  [name-defined]
phi4/a.py:9: note: See https://example.org
kernels/phi4_kernels/b.py:1: error: "float" has no attribute "to"  [attr-defined]
Found 3 errors in 2 files (checked 5 source files)
"""
COUNTS = {"phi4/a.py": 2, "kernels/phi4_kernels/b.py": 1}


def test_fewer_than_forty_errors_are_known() -> None:
    known = json.loads(check_types.KNOWN.read_text(encoding="utf-8"))
    assert sum(known.values()) < 40
    assert [path for path in known if not (check_types.ROOT / path).is_file()] == []
    assert list(known) == sorted(known) and all(count > 0 for count in known.values())


def test_errors_are_counted_by_file_without_notes() -> None:
    assert check_types.errors_by_file(FOUND) == Counter(COUNTS)


@pytest.mark.parametrize(
    ("known", "more", "fewer"),
    [
        (COUNTS, [], []),
        ({"phi4/a.py": 2}, ["kernels/phi4_kernels/b.py: 1 type errors, 0 known"], []),
        (COUNTS | {"phi4/a.py": 1}, ["phi4/a.py: 2 type errors, 1 known"], []),
        (COUNTS | {"phi4/a.py": 3}, [], ["phi4/a.py: 2 type errors, 3 known"]),
        (COUNTS | {"phi4/gone.py": 1}, [], ["phi4/gone.py: 0 type errors, 1 known"]),
    ],
)
def test_other_number_than_the_known_one_is_told(
    known: dict[str, int], more: list[str], fewer: list[str]
) -> None:
    assert check_types.differences(COUNTS, known) == (more, fewer)


def test_numbers_are_lowered_and_never_raised() -> None:
    known = {"phi4/a.py": 1, "kernels/phi4_kernels/b.py": 4, "phi4/gone.py": 1}
    assert check_types.lowered(COUNTS, known) == {"phi4/a.py": 1, "kernels/phi4_kernels/b.py": 1}


def mypy_says(monkeypatch: pytest.MonkeyPatch, code: int, arguments: list[str]) -> None:
    def run(command: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], code, FOUND, "")

    monkeypatch.setattr(check_types.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["check_types", *arguments])


@pytest.mark.parametrize(
    ("known", "mypy_code", "code", "told"),
    [
        (COUNTS, 1, 0, "mypy: 3 errors, 3 known"),
        ({"phi4/a.py": 2}, 1, 1, '"float" has no attribute "to"'),
        (COUNTS | {"phi4/a.py": 3}, 1, 1, "tools.check_types --write"),
        (COUNTS, 2, 2, "mypy failed with exit code 2"),
    ],
)
def test_exit_code_says_whether_the_numbers_hold(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    known: dict[str, int],
    mypy_code: int,
    code: int,
    told: str,
) -> None:
    monkeypatch.setattr(check_types, "KNOWN", tmp_path / "known.json")
    check_types.KNOWN.write_text(json.dumps(known), encoding="utf-8")
    mypy_says(monkeypatch, mypy_code, [])
    assert check_types.main() == code
    assert told in capsys.readouterr().out


def test_write_lowers_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_types, "KNOWN", tmp_path / "known.json")
    check_types.KNOWN.write_text(json.dumps(COUNTS | {"phi4/a.py": 3}), encoding="utf-8")
    mypy_says(monkeypatch, 1, ["--write"])
    assert check_types.main() == 0
    assert json.loads(check_types.KNOWN.read_text(encoding="utf-8")) == dict(sorted(COUNTS.items()))
