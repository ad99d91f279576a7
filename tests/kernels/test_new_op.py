"""An op added to a copy of the repository by CONTRIBUTING's steps alone, and seen by every gate."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sizes import ROOT

COPIED = ("csrc", "kernels", "phi4", "tests", "tools")
NEW_OP = ROOT / "tests/kernels/new_op/stretch"
MUTANT = """MUTANTS = {
    "a stretch of the wrong columns": (
        "stretch",
        "triton_impl.py",
        "row * stride_x + cols, mask",
        "row * stride_x + cols + 1, mask",
        "stretch",
        "w63",
        "bf16",
    ),
"""
GATES = (
    "tests/kernels/test_numbers.py",
    "tests/kernels/test_contracts.py",
    "tests/kernels/test_operators.py",
    "tests/kernels/test_dispatch.py",
    "tests/kernels/test_bench.py",
    "tests/architecture/test_imports.py",
    "tests/architecture/test_sizes.py",
    "tests/architecture/test_packaging.py",
)
SELECTED = "stretch or status_lists or keep_the_rules or too_large or every_folder"
ASK = """
import json, torch
from phi4_kernels import dispatch, registry
from phi4_kernels.stretch import stretch

cpu = torch.device("cpu")
print(json.dumps({
    "states": {row["implementation"]: row["state"]
               for row in dispatch.status() if row["op"] == "stretch"},
    "reasons": [dispatch.choose("stretch", name, cpu).describe() for name in ("auto", "triton")],
    "results": stretch(torch.ones(2), 3.0, implementation="triton").tolist(),
}))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the op, after the steps that generate no file."""
    copy = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md")):
        shutil.copy(path, copy)
    package = copy / "kernels/phi4_kernels"
    shutil.copytree(NEW_OP, package / "stretch")
    replace(package / "registry.py", '    "rope",\n', '    "rope",\n    "stretch",\n')
    replace(copy / "tests/kernels/test_numbers.py", "MUTANTS = {\n", MUTANT)
    return copy


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has no single {old!r}"
    path.write_text(text.replace(old, new))


def python(copy: Path, *arguments: str, **environment: str) -> str:
    """Output of Python in the copy, which must succeed."""
    paths = os.pathsep.join((str(copy), str(copy / "kernels")))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_gates_take_the_new_op_up(copy: Path) -> None:
    options = ("-p", "no:cacheprovider", "-q", "-rA", "-m", "not gpu")
    shown = python(copy, "-m", "pytest", *options, "-k", SELECTED, *GATES)
    for test in (
        "test_torch_obeys_the_error_rule[stretch-empty-fp32]",
        "test_triton_obeys_the_error_rule[stretch-w300-strided-bf16]",
        "test_a_mutant_turns_the_gate_red[a stretch of the wrong columns]",
        "test_second_derivatives_are_right_or_refused[stretch-w63-triton]",
        "test_operators_pass_opcheck[stretch]",
        "test_the_byte_formula_is_the_byte_count[stretch-backward-t16384-w5120]",
        "test_packages_keep_the_rules",
        "test_no_file_or_function_is_too_large",
    ):
        assert f"::{test}\n" in shown.replace(" - ", "\n"), shown


@pytest.mark.slow
def test_the_new_op_is_experimental_and_runs_when_named(copy: Path) -> None:
    said = json.loads(python(copy, "-c", ASK, TRITON_INTERPRET="1"))
    assert said["states"] == {
        "torch": "always available",
        "triton": "experimental: never executed on a GPU",
    }
    assert said["reasons"] == [
        "stretch: torch (auto: tensors are on cpu)",
        "stretch: triton (named; interpreted on the CPU)",
    ]
    assert said["results"] == [3.0, 3.0]


@pytest.mark.slow
def test_the_generated_files_take_the_new_op_up(copy: Path) -> None:
    python(copy, "-m", "phi4_kernels.bench", "--report")
    options = ("-p", "no:cacheprovider", "-q", "-k", "committed_floors")
    assert "1 passed" in python(copy, "-m", "pytest", *options, "tests/kernels/test_bench.py")
    python(copy, "-m", "phi4_kernels.testing", "budgets", "--op", "stretch")
    shown = python(copy, "-m", "phi4_kernels.testing", "compile", "--op", "stretch")
    assert "6 kernels compiled for sm_90, 0 over budget" in shown
    assert "stretch/w5120/bf16/_stretch_kernel" in shown
