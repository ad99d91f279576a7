"""The kernels and their launchers, run as host code, equal the host forms in every bit.

What cuda_on_host.h executes is csrc's own text: grids, tables of tensors, tails, barriers, warp
reductions. What it cannot show is left to `make gpu`.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from phi4_kernels import cuda_library

from tests.csrc import host_checks
from tests.csrc.host_checks import FP8, HYPER
from tests.csrc.host_forms import HostForms, OnHost

HEADER = Path(__file__).parent / "cuda_on_host.h"
LAUNCH = re.compile(r"([\w<>]+?)<<<(\w+), (\w+), \w+, stream>>>\((.*?)\);")
SHARED = "extern __shared__ __align__(16) unsigned char memory[];"


def _as_host_code(text: str) -> str:
    text, count = LAUNCH.subn(r"cuda_on_host::launch(\2, \3, [=] { \1(\4); });", text)
    assert count > 0
    return text.replace(SHARED, "auto* memory = cuda_on_host::dynamic_shared;")


def build_on_host(sources: Path, target: Path) -> OnHost:
    """Compile the .cu files of a copy of csrc/ as C++, beside their host forms."""
    units = [str(path) for path in sources.glob("*/*_host.cpp")]
    for kernel in sources.glob("*/*.cu"):
        unit = kernel.with_suffix(".on_host.cpp")
        unit.write_text(f'#include "{HEADER}"\n' + _as_host_code(kernel.read_text()))
        units.append(str(unit))
    flags = ("-std=c++17", "-O1", "-Xcompiler", "-fPIC,-Wno-attributes", "-shared")
    subprocess.run(["nvcc", *flags, *units, "-o", str(target)], check=True)
    return OnHost(target)


def build_copy(folder: Path, mutants: dict[str, tuple[str, str]]) -> OnHost:
    """A build of csrc/ with texts of its files replaced."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH, and the kernels are compiled as C++")
    sources = shutil.copytree(cuda_library.SOURCES, folder / "csrc")
    for name, (old, new) in mutants.items():
        text = (sources / name).read_text()
        assert text.count(old) == 1, f"{old} does not occur once in {name}"
        (sources / name).write_text(text.replace(old, new))
    return build_on_host(sources, folder / "kernels.so")


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    return build_copy(tmp_path_factory.mktemp("on_host"), {})


def _shards(sizes: list[int], offset: int, grad_dtype: torch.dtype, fp8: bool) -> list[tuple]:
    draw = torch.Generator().manual_seed(len(sizes))
    shards = []
    for size in sizes:
        param, exp_avg, root, grad = torch.randn(4, size + offset, generator=draw)[:, offset:]
        weight = torch.full((size,), 7.0, dtype=torch.bfloat16)
        data = torch.zeros(size, dtype=torch.uint8).view(FP8[0])
        kept = (data, torch.tensor(30.0), torch.tensor(0.5)) if fp8 else (None, None, None)
        state = (param.clone() if not offset else param, exp_avg, root.square())
        shards.append((*state, grad.to(grad_dtype), weight, *kept))
    return shards


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [[1], [5000], [0, 4096, 4097, 0, 3], [n % 7 for n in range(90)], [70, 20_001] * 25],
    ids=lambda sizes: f"{len(sizes)} shards",
)
def test_adamw(
    on_host: OnHost, forms: HostForms, sizes: list[int], grad_dtype: torch.dtype, fp8: bool
) -> None:
    for offset in (0, 1):
        ours, expected = (_shards(sizes, offset, grad_dtype, fp8) for _ in range(2))
        on_host.adamw_shards(ours, 3, HYPER, torch.tensor(0.3))
        forms.adamw_shards(expected, 3, HYPER, torch.tensor(0.3))
        for one, other in zip(ours, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                assert (a is None and b is None) or torch.equal(
                    a.view(torch.uint8) if a.dtype == FP8[0] else a,
                    b.view(torch.uint8) if b.dtype == FP8[0] else b,
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[0], [1], [65536, 0, 65537, 200_001], [3] * 140], ids=len)
def test_square_sum(
    on_host: OnHost, forms: HostForms, sizes: list[int], dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(6)
    tensors = [torch.randn(size, generator=draw).to(dtype) for size in sizes]
    assert torch.equal(on_host.square_sum(tensors), forms.square_sum(tensors))


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_fp8_cast(on_host: OnHost, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    host_checks.casts(on_host, x_dtype, dtype)


MUTANTS = {
    "launch.cuh": ("first_chunk[middle] <= chunk", "first_chunk[middle] < chunk"),
    "fp8_cast/fp8_cast.cu": ("__syncthreads();\n    const int64_t row", "const int64_t row"),
}


def test_mutants_of_launches_and_barriers_are_caught(forms: HostForms, tmp_path: Path) -> None:
    wrong = build_copy(tmp_path, MUTANTS)
    ours, expected = (_shards([4096, 5], 0, torch.float32, False) for _ in range(2))
    wrong.adamw_shards(ours, 3, HYPER)
    forms.adamw_shards(expected, 3, HYPER)
    assert not torch.equal(ours[1][0], expected[1][0])
    tensors = [torch.ones(65536), torch.ones(5)]
    assert not torch.equal(wrong.square_sum(tensors), forms.square_sum(tensors))
    with pytest.raises(AssertionError):
        host_checks.casts(wrong, torch.float32, FP8[0])
