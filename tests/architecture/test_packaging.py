"""What is installed: two packages, importable from anywhere, and nothing called `kernels`."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_editable_packages_are_found_from_anywhere(tmp_path: Path) -> None:
    script = "import phi4, phi4_kernels; print(phi4.__file__); print(phi4_kernels.__file__)"
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, text=True)
    roots = [ROOT / "phi4", ROOT / "kernels" / "phi4_kernels"]
    assert printed.split() == [str(root / "__init__.py") for root in roots]


def test_every_folder_with_code_is_a_package() -> None:
    code = [*(ROOT / "phi4").glob("**/*.py"), *(ROOT / "kernels/phi4_kernels").glob("**/*.py")]
    folders = {path.parent for path in code}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_kernels_is_no_package() -> None:
    # Hugging Face's `kernels` is a top-level package; a regular one of ours would shadow it.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_file_beside_the_code_is_shipped_with_it() -> None:
    keywords = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "package_data"
    ]
    patterns = ast.literal_eval(keywords[0].value)["phi4"]
    shipped = {path for pattern in patterns for path in (ROOT / "phi4").glob(pattern)}
    files = {path for path in (ROOT / "phi4").glob("**/*") if path.is_file()}
    beside = {path for path in files if path.suffix not in (".py", ".pyc", ".md")}
    assert ROOT / "phi4/serve/chat_page/page.html" in beside
    assert beside - shipped == set()


@pytest.mark.slow
def test_wheel_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    files = subprocess.check_output(["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT)
    copy = tmp_path / "copy"
    for name in files.decode().splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(copy)], check=True)
    (wheel,) = tmp_path.glob("phi4-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"phi4", "phi4_kernels"}
    shipped = {name for name in names if name.endswith(".py")}
    ours = {str(path.relative_to(copy)) for path in copy.glob("phi4/**/*.py")}
    ours |= {str(path.relative_to(copy / "kernels")) for path in copy.glob("kernels/**/*.py")}
    assert shipped == ours
