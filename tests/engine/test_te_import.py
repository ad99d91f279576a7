"""Transformer Engine that is absent, broken or of another version breaks nothing else."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from phi4.config import PrecisionConfig, Recipe
from phi4.engine.checkpoint import open as open_file
from phi4.engine.engine import Engine
from phi4.engine.fake_ranks import ChunkShape, rank_shapes
from phi4.engine.model.fp8 import te_backend
from phi4.engine.platform import Platform
from phi4.engine.te_import import TransformerEngine
from phi4.errors import PlatformError
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool
from tests.support.te_runs import ROOT, SIZES

CUDNN = "raise OSError('libcudnn.so.9: cannot open shared object file')"
ALONE = "__version__ = '{}'"
WITH_TORCH = ALONE + "; from . import pytorch"
NOT_FOUND = "its import raised ModuleNotFoundError: No module named "
PACKAGES = {
    # What its __init__ does, and what is said of it.
    "absent": ("", "it is not installed"),
    "without cuDNN": (CUDNN, "its import raised OSError: libcudnn.so.9: cannot open "),
    "of another torch": ("raise RuntimeError('ABI')", "its import raised RuntimeError: ABI"),
    "without its library": ("import no_such_library", f"{NOT_FOUND}'no_such_library'"),
    "without torch's side": (ALONE.format("2.11.0"), f"{NOT_FOUND}'transformer_engine.pytorch'"),
    "too old": (WITH_TORCH.format("2.8.0"), "version 2.8.0 is installed"),
    "too new": (WITH_TORCH.format("2.12.0"), "version 2.12.0 is installed"),
}
CHILD = """
import importlib.util, json, os, sys
import torch
def found(path, has_gpu):
    sys.path.insert(0, path)
    torch.cuda.is_available = lambda: has_gpu
    spec = importlib.util.spec_from_file_location("te_import", sys.argv[1])
    module = sys.modules["te_import"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        import transformer_engine
        how = "imported"
    except Exception as error:
        how = type(error).__name__
    # As libraries look for a package that they do without.
    spec = how != "imported" and importlib.util.find_spec("transformer_engine")
    found = module.TRANSFORMER_ENGINE
    return [found.version, found.problem, how, spec]
for path, has_gpu in json.loads(sys.argv[2]):
    sys.stdout.flush()
    if os.fork() == 0:
        print(json.dumps(found(path, has_gpu)), flush=True)
        os._exit(0)
    os.wait()
"""


def printed_by(code: str, *arguments: str, python_path: str = "") -> list[str]:
    """Lines that a fresh interpreter prints."""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": python_path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()


def package(directory: Path, source: str) -> Path:
    """A Transformer Engine whose import runs this; none for nothing."""
    directory.mkdir()
    if source:
        (directory / "transformer_engine").mkdir()
        (directory / "transformer_engine/__init__.py").write_text(source + "\n")
        if "pytorch" in source:
            (directory / "transformer_engine/pytorch.py").touch()
    return directory


def test_what_cannot_be_used_looks_like_what_is_not_installed(tmp_path: Path):
    cases = {name: source for name, (source, _) in PACKAGES.items()}
    cases["fits"] = WITH_TORCH.format("2.9.0+abc")
    mark = tmp_path / "mark"
    cases["on a CPU"] = f"open({str(mark)!r}, 'w')"
    paths = [
        (str(package(tmp_path / name, source)), name != "on a CPU")
        for name, source in cases.items()
    ]
    lines = printed_by(CHILD, str(ROOT / "phi4/engine/te_import.py"), json.dumps(paths))
    found = dict(zip(cases, map(json.loads, lines), strict=True))
    for name, (_, problem) in PACKAGES.items():
        version, said, later, spec = found[name]
        assert said.startswith(problem), name
        assert (version, later, spec) == ("", "ModuleNotFoundError", None), name
    assert found["fits"][:3] == ["2.9.0+abc", "", "imported"]
    said = "it is imported on machines with a CUDA device only"
    assert found["on a CPU"] == ["", said, "ModuleNotFoundError", None] and not mark.exists()


@pytest.mark.slow
def test_the_engine_imports_beside_a_broken_one_and_without_collections(tmp_path: Path):
    code = (
        "import gc, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "before = gc.get_stats()[2]['collections']\n"
        "import phi4.engine\n"
        "print(gc.get_stats()[2]['collections'] - before, gc.isenabled())\n"
        "import phi4.engine.engine\n"
        "from megatron.core.extensions.transformer_engine import HAVE_TE\n"
        "from phi4.engine.te_import import TRANSFORMER_ENGINE\n"
        "print(HAVE_TE, TRANSFORMER_ENGINE.problem)\n"
    )
    path = os.pathsep.join(
        [str(package(tmp_path / "broken", CUDNN)), str(ROOT), str(ROOT / "kernels")]
    )
    said = "its import raised OSError: libcudnn.so.9: cannot open shared object file"
    assert printed_by(code, python_path=path) == ["0 True", f"False {said}"]


GPU = Platform("cuda", torch.device("cuda"), 0, 1, "a CUDA device is present")
TE = PrecisionConfig(fp8="te")


def test_the_engine_refuses_a_cpu_before_any_group_exists():
    platform = Platform("cpu", torch.device("cpu"), 0, 1, "torch finds no CUDA device")
    assert not dist.is_initialized()
    with pytest.raises(PlatformError) as error:
        Engine(tiny_recipe(*SIZES), platform)
    assert str(error.value) == (
        "precision.fp8=te needs a GPU, but this run is on the CPU (torch finds no CUDA device); "
        "use precision.fp8=torch, or off"
    )
    assert not dist.is_initialized()


def test_what_is_missing_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    missing = TransformerEngine("", "its import raised OSError: libcudnn.so.9")
    monkeypatch.setattr(te_backend, "TRANSFORMER_ENGINE", missing)
    with pytest.raises(PlatformError) as error:
        te_backend.check_backend(TE, GPU)
    assert str(error.value) == (
        "precision.fp8=te needs Transformer Engine 2.9 to 2.11, but its import raised OSError: "
        "libcudnn.so.9; install the extra te of phi4, or use precision.fp8=torch, or off"
    )
    te_backend.check_backend(PrecisionConfig(), GPU)


def scores(rank: int, world_size: int, fp8: str) -> tuple[str, str, list[float]]:
    """Class of a linear, FP8 of the engine's recipe, and log-probabilities without training."""
    with engine_on(rank, tiny_recipe(*SIZES, f"precision.fp8={fp8}"), trains=False) as engine:
        linear = engine.bare_chunks[0].decoder.layers[1].mlp.linear_fc1
        found = engine.log_probs(batches_of(engine, 0)[:1])[0].labels
        return type(linear).__name__, engine.recipe.precision.fp8, found.ravel().tolist()


def test_whoever_does_not_train_needs_no_transformer_engine():
    with RankPool(1) as pool:
        [(linear, fp8, found)], [(_, _, expected)] = (
            pool.run(scores, fp8) for fp8 in ("te", "off")
        )
    assert (linear, fp8) == ("ColumnParallelLinear", "te") and found == expected


def test_weights_of_a_run_with_it_are_read_anywhere(monkeypatch: pytest.MonkeyPatch):
    written = tiny_recipe(*SIZES)
    monkeypatch.setattr(open_file, "read_recipe", lambda checkpoint: written)
    asked = ("run.platform=cpu", "precision.dtype=fp32")
    recipe = open_file.recipe_of(Path("step_0000001"), asked)
    assert (recipe.precision.fp8, recipe.precision.dtype) == ("off", "fp32")


def without_fp8_counts(recipe: Recipe) -> list[tuple[int, int, list[ChunkShape]]]:
    """Place and chunks of all ranks, but what of them is in FP8."""
    nothing = {"num_fp8_layers": 0, "num_fp8_parameters": 0}
    return [
        (rank.pp_rank, rank.tp_rank, [replace(chunk, **nothing) for chunk in rank.chunks])
        for rank in rank_shapes(recipe)
    ]


def test_a_plan_counts_the_same_parameters():
    te, off = (
        tiny_recipe(*SIZES, "parallel.tensor=2", f"precision.fp8={x}") for x in ("te", "off")
    )
    assert without_fp8_counts(te) == without_fp8_counts(off)
