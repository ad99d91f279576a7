"""The packages: `phi4` at the root, `phi4_kernels` under kernels/. The rest: pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["phi4", "phi4.*"]) + find_packages("kernels"),
    package_data={"phi4_kernels": ["*.jsonl"]},
    package_dir={"phi4": "phi4", "phi4_kernels": "kernels/phi4_kernels"},
)
