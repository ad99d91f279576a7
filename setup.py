"""The packages: `phi4` at the root, `phi4_kernels` under kernels/. The rest: pyproject.toml."""

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup


class BuildCsrc(Command):
    """`python setup.py build_csrc`, which is `make csrc`: the CUDA ops, where nvcc is installed.

    Apart from the packages, because it needs torch's headers and an install need not wait for it.
    """

    description = "build csrc/ for sm_90a where nvcc is installed"
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Build."""
        script = Path(__file__).with_name("tools") / "build_csrc.py"
        subprocess.run([sys.executable, str(script)], check=True)


setup(
    packages=find_packages(include=["phi4", "phi4.*"]) + find_packages("kernels"),
    package_data={
        "phi4": ["**/*.j2", "**/*.html", "**/*.css", "**/*.js"],
        "phi4_kernels": ["*.jsonl"],
    },
    package_dir={"phi4": "phi4", "phi4_kernels": "kernels/phi4_kernels"},
    cmdclass={"build_csrc": BuildCsrc},
)
