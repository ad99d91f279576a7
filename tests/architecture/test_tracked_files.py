"""What is committed names no registry host and no place on one machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Written in pieces, because this file is tracked too.
HOSTS = (
    "pypi" + r"\.org",
    "pythonhosted" + r"\.org",
    r"download\.pytorch" + r"\.org",
    r"pypi\.nvidia" + r"\.com",
    "nvcr" + r"\.io",
    "ghcr" + r"\.io",
    "quay" + r"\.io",
    r"(?:anaconda|npmjs|debian)\." + "org",
)
PLACES = ("work", "root", "home", "Users", "scratch", "opt/wheels", "opt/pypi", "mnt", "data")
FORBIDDEN = re.compile(
    # A path starts there: no name, dot or tilde before its first slash.
    "|".join(HOSTS) + r"|(?<![\w.~}*)\]<>/-])/(?:" + "|".join(PLACES) + r")(?:-more)?/(?=[\w.])"
)

EXEMPT = "constraints/torch_cpu_index.txt"
"""The one file that may name a host: tools/setup.sh gives its line to pip for TORCH=cpu."""


def tracked_files(root: Path) -> list[Path]:
    """Files that git knows or would add."""
    # A clone may belong to another user than root.
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.check_output([*git, "--cached", "--others", "--exclude-standard"], cwd=root)
    return [root / name for name in listed.decode().split("\0") if name and (root / name).is_file()]


def offences(text: str) -> list[str]:
    return [
        f"{number}: {line.strip()[:120]}"
        for number, line in enumerate(text.splitlines(), 1)
        if FORBIDDEN.search(line)
    ]


def test_tracked_files_name_no_registry_and_no_machine() -> None:
    files = tracked_files(ROOT)
    assert len(files) > 30
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line in offences(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    # Exactly one line of exactly one file.
    (index,) = (ROOT / EXEMPT).read_text(encoding="utf-8").splitlines()
    assert found == [f"{EXEMPT}:1: {index}"]


@pytest.mark.parametrize(
    "line",
    [
        "pip install -i https://pypi" + ".org/simple x",
        "--extra-index-url https://download.pytorch" + ".org/whl/cpu",
        "FROM nvcr" + ".io/nvidia/pytorch",
        "path = '/" + "work/main/x'",
        "cd /" + "home/ada/phi4",
        "DIR=/" + "root/.cache",
        "--dir=/" + "scratch/run",
        "(/" + "Users/ada)",
    ],
)
def test_planted_line_is_found(line: str) -> None:
    assert offences(f"fine\n{line}\n") == [f"2: {line}"]


@pytest.mark.parametrize(
    "line",
    [
        "runs/demo/data/code",
        "$HOME/data/x",
        "../shared/data/x",
        "a/home/b",
        "https://example.com/data/x",
        "{root}/work/x",
        "docker run -w /phi4",
    ],
)
def test_other_paths_are_not(line: str) -> None:
    assert offences(line) == []
