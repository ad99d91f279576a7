"""The built library: what ptxas says of its kernels, and what torch sees of its ops on a CPU."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from phi4_kernels import cuda_library, dispatch, operators, registry
from phi4_kernels.errors import ImplementationError
from torch import Tensor
from torch.library import opcheck

from tools import build_csrc

CPU = torch.device("cpu")
registry.entries("cuda")  # imports the ops, which defines their public operators


def test_kernels_do_not_spill_and_keep_their_budget(built: Path) -> None:
    found = build_csrc.resources((built / build_csrc.REPORT).read_text())
    if not build_csrc.budget_path().exists():
        pytest.fail(f"no {build_csrc.budget_path()}; run tools/build_csrc.py --budgets, review it")
    budgets = json.loads(build_csrc.budget_path().read_text())
    assert set(found) == set(budgets)
    for kernel, numbers in found.items():
        assert numbers["stack_bytes"] == numbers["spill_stores"] == numbers["spill_loads"] == 0
        worse = [name for name, value in numbers.items() if value > budgets[kernel][name]]
        assert not worse, f"{kernel}: {worse} over {build_csrc.budget_path().name}"


def test_a_spill_is_read_from_the_report() -> None:
    report = (
        "ptxas info    : Compiling entry function '_ZN4phi48a_kernelEPf' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z1kPf\n"
        "    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem\n"
    )
    assert build_csrc.resources(report) == {
        "a_kernel": {
            "stack_bytes": 24,
            "spill_stores": 20,
            "spill_loads": 16,
            "registers": 255,
            "shared_bytes": 2048,
        }
    }


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("IfLb0EEEvNS0_5TableE", "adamw_kernel<float, false>"),
        ("I13__nv_bfloat16Lb1ELi2EEEv11Phi4Fp8Castbb", "adamw_kernel<__nv_bfloat16, true, 2>"),
        ("EPKdlPd", "adamw_kernel"),
    ],
)
def test_kernel_names_are_readable_without_a_demangler(mangled: str, name: str) -> None:
    file_scope = "_ZN4phi440_GLOBAL__N__ed7e2145_8_adamw_cu_db192062"
    assert build_csrc.readable(f"{file_scope}12adamw_kernel{mangled}") == name


def test_a_name_of_another_form_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not the mangled name"):
        build_csrc.readable("_Z4mainv")


@pytest.fixture(scope="module")
def instructions(built: Path) -> dict[str, dict[str, int]]:
    """What the gate counts, by the mangled name of the kernel."""
    compiled = pytest.importorskip("phi4_kernels.testing.compiled")
    sass = compiled.tool("cuobjdump", "--dump-sass", str(built / cuda_library.LIBRARY))
    parts = [part.partition("\n") for part in sass.split("Function :")[1:]]
    return {name.strip(): compiled.count_instructions(code) for name, _, code in parts}


def test_sums_use_no_floating_point_atomics(built: Path, instructions: dict) -> None:
    assert len(instructions) == len(build_csrc.resources((built / "ptxas.txt").read_text()))
    for counts in instructions.values():
        assert counts["float_atomics"] == 0 and counts["local_accesses"] == 0


@pytest.mark.parametrize(
    ("kernel", "loads", "stores"),
    [
        ("adamw_kernelIfLb", 4, 3),
        ("adamw_kernelI13__nv_bfloat16", 3, 3),
        ("square_sum_kernelIf", 8, 0),
    ],
)
def test_fp32_moves_sixteen_bytes_at_once(
    instructions: dict, kernel: str, loads: int, stores: int
) -> None:
    found = [counts for name, counts in instructions.items() if kernel in name]
    assert found
    for counts in found:
        assert (counts["wide_loads"], counts["wide_stores"]) == (loads, stores)


def _arguments(size: int = 8) -> list[object]:
    state = [[torch.ones(size)], [torch.zeros(size)], [torch.zeros(size)]]
    weights = [torch.zeros(size, dtype=torch.bfloat16)]
    fp8 = [[torch.zeros(size, dtype=torch.float8_e4m3fn)], [torch.ones(())], [torch.zeros(())]]
    scalars = [None, torch.zeros(()), None, None]
    return [*state, [torch.ones(size)], weights, *fp8, *scalars, 0.1, 0.9, 0.95, 1e-8, 0.1, 1]


def test_schemas_and_fake_tensors(loaded: Path) -> None:
    ops = torch.ops.phi4
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    # The schema check multiplies its inputs, which FP8 tensors cannot.
    without_fp8 = [[] if index in (5, 6, 7) else a for index, a in enumerate(_arguments())]
    for adamw in (ops.adamw_.default, torch.ops.phi4_copying.adamw_.default):
        opcheck(adamw, tuple(without_fp8), test_utils=checks)
    opcheck(ops.square_sum.default, ([torch.ones(5), torch.ones(3)],), test_utils=checks)
    for scaling in range(3):
        scale = torch.ones(()) if scaling == 0 else None
        arguments = (torch.randn(130, 7), scale, scaling, False, True)
        opcheck(ops.fp8_cast.default, arguments, test_utils=checks)


def test_public_operators_take_no_stream() -> None:
    for name in ("adamw_", "square_sum", "fp8_cast"):
        schema = getattr(torch.ops.phi4, name).default._schema
        assert "stream" not in [argument.name for argument in schema.arguments]


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, [torch.ones(8, dtype=torch.float64)], "param has dtype Double; expected Float"),
        (1, [torch.ones(7)], "exp_avg 0 has 7 elements; expected 8"),
        (1, [torch.ones(8)] * 2, "got 2 of exp_avg; expected 1"),
        (2, [torch.ones(16)[::2]], "exp_avg_sq is not contiguous"),
        (3, [torch.ones(8).half()], "grad has dtype Half; expected Float or BFloat16"),
        (3, [], "got 0 of grad; expected 1"),
        (4, [torch.ones(8)], "weight has dtype Float; expected BFloat16"),
        (5, [torch.ones(8)], "fp8 weight has dtype Float; expected Float8_e4m3fn"),
        (6, [torch.ones(2)], "fp8 scale has 2 elements; expected 1"),
        (7, [], "got 1 fp8 scales and 0 fp8 amaxes; expected 1"),
        (8, torch.ones(2), "grad_scale has 2 elements; expected 1"),
        (9, torch.ones((), dtype=torch.bool), "found_inf has dtype Bool; expected Float"),
        (11, torch.ones((), dtype=torch.int32), "step has dtype Int; expected Long"),
        (17, 0, "step is 0; expected at least 1"),
    ],
)
def test_the_binding_refuses(loaded: Path, index: int, value: object, message: str) -> None:
    arguments = _arguments()
    arguments[index] = value
    before = arguments[0][0].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.phi4.adamw_(*arguments)
    assert torch.equal(arguments[0][0], before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.square_sum([]), "no tensor arguments"),
        (lambda op: op.square_sum([torch.ones(2), torch.ones(2).bfloat16()]), "expected Float"),
        (lambda op: op.fp8_cast(torch.ones(2), None, 1, False, False), "x has 1 dimensions"),
        (lambda op: op.fp8_cast(torch.ones(2, 2), None, 0, False, False), "tensor-wise"),
        (lambda op: op.fp8_cast(torch.ones(2, 2), None, 3, False, False), "scaling is 3"),
        (lambda op: op.fp8_cast(torch.ones(2, 4).t(), None, 1, False, False), "contiguous"),
    ],
)
def test_the_other_bindings_refuse(loaded: Path, call: object, message: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        call(torch.ops.phi4)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No build and no remembered choice."""
    monkeypatch.setattr(cuda_library, "BUILDS", tmp_path)
    for cached in (cuda_library.load, dispatch.choose):
        cached.cache_clear()
    yield tmp_path
    for cached in (cuda_library.load, dispatch.choose):
        cached.cache_clear()


def _cuda_rows() -> list[dict[str, str]]:
    return [row for row in dispatch.status() if row["implementation"] == "cuda"]


def test_a_missing_library_says_why(fresh: Path) -> None:
    with pytest.raises(ImplementationError, match="csrc is not built; run `make csrc`"):
        dispatch.choose("adamw", "cuda", CPU)
    assert all("not built" in row["state"] for row in _cuda_rows())
    assert dispatch.choose("adamw", "auto", CPU).implementation == "torch"


def test_a_library_of_other_sources_is_not_loaded(fresh: Path) -> None:
    (fresh / "0123").mkdir()
    (fresh / "0123" / cuda_library.LIBRARY).touch()
    with pytest.raises(ImplementationError, match="csrc is built from other sources"):
        dispatch.choose("adamw", "cuda", CPU)


def test_a_broken_library_says_so(fresh: Path) -> None:
    cuda_library.folder().mkdir()
    (cuda_library.folder() / cuda_library.LIBRARY).write_text("not a library")
    with pytest.raises(ImplementationError, match="cannot be loaded with torch"):
        dispatch.choose("adamw", "cuda", CPU)


def test_without_nvcc_the_build_says_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["build_csrc.py"])
    build_csrc.main()
    assert "csrc is not built: nvcc is not on PATH" in capsys.readouterr().out


def test_an_op_runs_on_the_device_and_stream_that_are_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current, seen = [0], []

    @contextmanager
    def device(index: torch.device):
        before, current[0] = current[0], index.index
        yield
        current[0] = before

    def stream(index: torch.device) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=70 + index.index)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    for index in (0, 1):
        with operators.stream_of(torch.device("cuda", index)) as found:
            seen.append((current[0], found))
    with operators.stream_of(CPU) as found:
        assert found == 0
    assert seen == [(0, 70), (1, 71)] and current == [0]


def test_setup_builds_what_make_csrc_builds(built: Path) -> None:
    root = cuda_library.SOURCES.parent
    command = [sys.executable, str(root / "setup.py"), "-q", "build_csrc"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(built / cuda_library.LIBRARY) in done.stdout


def test_unknown_implementations_are_refused() -> None:
    with pytest.raises(ImplementationError, match="no implementation 'triton'; there are cuda, "):
        dispatch.choose("adamw", "triton", CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_on_the_meta_device_has_its_shape(dtype: torch.dtype) -> None:
    total: Tensor = torch.ops.phi4.square_sum([torch.empty(3, dtype=dtype, device="meta")])
    assert total.shape == () and total.dtype == torch.float64
