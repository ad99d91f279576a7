"""tools/setup.sh and TORCH: which build of torch pip is asked for, and what is built again.

Python is real, pip a stand-in: it notes what it is asked and installs a few bytes instead. It has
torch's CUDA build, and the CPU build where one of its indexes is that of constraints/.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sizes import ROOT

INDEX = (ROOT / "constraints/torch_cpu_index.txt").read_text(encoding="utf-8").strip()
INSTALL = "install --disable-pip-version-check"
PIP = '''"""Stand-in."""
import json, os, sys, sysconfig
from pathlib import Path

site, words = Path(sysconfig.get_path("purelib")), sys.argv[1:]
with open("asked", "a") as asked:
    print(*words, file=asked)
*_, pin = (word for word in Path("constraints/cpu.txt").read_text().split() if "torch==" in word)
indexes = [*words, *os.environ.get("PIP_EXTRA_INDEX_URL", "").split()]
is_cpu = set(indexes) & set(os.environ["HAS_CPU_BUILD"].split())
requires = ["numpy"] if is_cpu else ["numpy", "triton==3.7.1; platform_system == 'Linux'"]
if "--report" in words:
    print(json.dumps({"install": [{"metadata": {"requires_dist": requires}}]}))
    sys.exit()
version = pin.partition("==")[2] + ("+cpu" if is_cpu else "")
info = site / f"torch-{version}.dist-info"
if not list(site.glob("torch-*.dist-info")):
    info.mkdir()
    lines = [f"Name: torch\\nVersion: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (info / "METADATA").write_text("Metadata-Version: 2.1\\n" + "\\n".join(lines) + "\\n")
for name in ("torch", "phi4", "phi4_kernels"):
    (site / f"{name}.py").touch()
'''
PYTHON = f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    {sys.executable} -m venv --without-pip "$3" "$4"
    echo "venv" >> asked
    exit
fi
exec {sys.executable} "$@"
"""


class Clone:
    """What setup.sh reads of a clone, on a machine that is good enough."""

    def __init__(self, place: Path) -> None:
        self.place = place
        shutil.copytree(ROOT / "constraints", place / "constraints")
        (place / "tools").mkdir()
        for name in ("pyproject.toml", "setup.py", "tools/setup.sh"):
            shutil.copy(ROOT / name, place / name)
        (place / "tools/check_machine.sh").write_text('echo "$PYTHON"\n')
        # `python -m pip` finds it in the working directory.
        (place / "pip.py").write_text(PIP)
        (place / "python").write_text(PYTHON)
        (place / "python").chmod(0o755)
        self.done: subprocess.CompletedProcess[str] | None = None

    def setup(self, **variables: str) -> list[str]:
        """What venv and pip are asked by `tools/setup.sh`; its end is in `done`."""
        asked = self.place / "asked"
        asked.unlink(missing_ok=True)
        own = {"PYTHON": str(self.place / "python"), "HAS_CPU_BUILD": INDEX}
        shell = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        self.done = subprocess.run(
            ["bash", "tools/setup.sh"],
            cwd=self.place,
            env=shell | own | variables,
            capture_output=True,
            text=True,
        )
        return asked.read_text().splitlines() if asked.exists() else []

    @property
    def build(self) -> str:
        """Torch's build in .venv, by its version."""
        (info,) = self.place.glob(".venv/lib/python3*/site-packages/torch-*.dist-info")
        return "cpu" if "+cpu" in info.name else "cuda"


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_torch_cpu_adds_the_index_that_has_the_cpu_build(clone: Clone) -> None:
    _, by_itself, with_index, installs = clone.setup(TORCH="cpu")
    assert clone.done.returncode == 0, clone.done.stderr
    assert "--report" in by_itself and INDEX not in by_itself
    assert "--report" in with_index and f"--extra-index-url {INDEX}" in with_index
    assert installs == (
        f"{INSTALL} --extra-index-url {INDEX} -c constraints/cpu.txt -e .[dev,triton]"
    )
    assert clone.build == "cpu"
    # Whoever leaves TORCH out afterwards keeps what is there.
    assert clone.setup(TORCH="cpu") == clone.setup() == []


def test_without_torch_pip_decides(clone: Clone) -> None:
    *_, installs = clone.setup()
    assert installs == f"{INSTALL} -c constraints/cuda.txt -e .[dev,triton]"
    assert clone.build == "cuda" and "add TORCH=cpu" in clone.done.stdout


@pytest.mark.parametrize(
    "settings",
    [
        {"PIP_EXTRA_INDEX_URL": "http://mirror.invalid/cpu"},
        {"PIP_ARGS": "--extra-index-url http://mirror.invalid/cpu"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_lead_to_the_cpu_build_are_left_alone(
    clone: Clone, settings: dict[str, str]
) -> None:
    asked = clone.setup(TORCH="cpu", HAS_CPU_BUILD="http://mirror.invalid/cpu", **settings)
    assert clone.done.returncode == 0, clone.done.stderr
    assert clone.build == "cpu" and INDEX not in "".join(asked)


def test_cpu_build_in_place_of_the_cuda_build_is_a_new_environment(clone: Clone) -> None:
    clone.setup()
    assert clone.setup(TORCH="cpu").count("venv") == 1
    assert "has torch's CUDA build, TORCH=cpu asks for the CPU build" in clone.done.stdout
    assert clone.build == "cpu"


def test_cuda_build_of_an_interrupted_setup_is_replaced_too(clone: Clone) -> None:
    clone.setup()
    (clone.place / ".venv/.phi4-setup").unlink()
    assert clone.setup(TORCH="cpu").count("venv") == 1
    assert clone.build == "cpu"


def test_cpu_build_that_cannot_be_had_is_refused_before_the_download(clone: Clone) -> None:
    asked = clone.setup(TORCH="cpu", HAS_CPU_BUILD="")
    (line,) = clone.done.stderr.splitlines()
    assert clone.done.returncode == 1
    assert "TORCH=cpu, but pip got torch's CUDA build; expected the CPU build of" in line
    assert not any(words.startswith(INSTALL) for words in asked)


def test_unknown_build_is_refused_in_a_line(clone: Clone) -> None:
    assert clone.setup(TORCH="gpu") == []
    (line,) = clone.done.stderr.splitlines()
    assert clone.done.returncode == 2
    assert line.startswith("phi4: got TORCH=gpu; expected TORCH=cpu, or no TORCH")


@pytest.mark.parametrize("target", ["setup", "demo", "test"])
def test_make_hands_torch_over(clone: Clone, target: str) -> None:
    """By a value that ends it before anything is done."""
    shutil.copy(ROOT / "Makefile", clone.place / "Makefile")
    made = subprocess.run(
        ["make", target, "TORCH=gpu"], cwd=clone.place, capture_output=True, text=True
    )
    assert made.returncode == 2
    assert made.stderr.startswith("phi4: got TORCH=gpu; expected TORCH=cpu")
