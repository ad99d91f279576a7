"""The packages keep their layers, and every rule finds what breaks it."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.architecture.import_graph import Source, file_cycles, read_sources
from tests.architecture.import_rules import LAYERS, violations
from tests.architecture.sizes import ROOT


def write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n", encoding="utf-8")


def planted(root: Path, path: str, text: str) -> list[str]:
    write(root, {path: text})
    return violations(read_sources(root))


def test_packages_keep_the_rules(sources: Sequence[Source]) -> None:
    assert violations(sources) == []


def test_contributing_says_the_layers() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("`cli` | "))
    said = tuple(tuple(re.findall(r"`(\w+)`", layer)) for layer in line.split(" | "))
    assert said == LAYERS[1:]


def test_no_files_import_each_other(sources: Sequence[Source]) -> None:
    assert file_cycles([*sources, *read_sources(ROOT, ["tools"])]) == []


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("phi4/train/loop.py", "from phi4.stages.pretrain import step", "may not import stages"),
        ("phi4/track/jsonl.py", "import phi4.engine.step", "track may not import engine"),
        ("phi4/launch/x.py", "import phi4.verify.parity", "launch may not import verify"),
        ("phi4/plan/x.py", "from phi4.sampling import local", "plan may not import sampling"),
        ("phi4/convert/x.py", "import phi4.stages", "convert may not import stages"),
        ("phi4/oracles/x.py", "import phi4.config", "oracles may not import config"),
        ("phi4/pts/x.py", "from phi4 import engine", "pts may not import engine: use sampling"),
        ("phi4/serve/x.py", "import phi4.engine.engine", "serve may not import engine: use"),
        ("phi4/synth/x.py", "def f():\n    import phi4.engine.step", "x.py:2: synth may not"),
        ("phi4/evaluate/x.py", "from ..engine.step import f", "evaluate may not import engine"),
        ("phi4/data/blend.py", "from phi4 import engine", "may not import engine"),
        ("phi4/data/blend.py", "from ..model import shape", "may not import model"),
        ("phi4/engine/model/b.py", "from ...cli import main", "may not import cli"),
        ("phi4/data/__init__.py", "from ..train import loop", "may not import train"),
        ("phi4/errors.py", "from phi4.config import Recipe", "may not import config"),
        ("phi4/__init__.py", "from phi4.config import Recipe", "phi4 may not import config"),
        ("phi4/data/x.py", "def f():\n    import phi4.engine", "x.py:2: data may not import"),
        ("phi4/data/x.py", "import importlib as i\ni.import_module('phi4.train')", "import train"),
        ("phi4/helpers/x.py", "", "package 'helpers' has no layer"),
        ("phi4/cli.py", "import phi4.helpers", "a package without a layer"),
        ("phi4/data/x.py", "import phi4_kernels", "data may not import phi4_kernels"),
        ("phi4/train/x.py", "from phi4_kernels.dispatch import f", "train may not import phi4_k"),
        ("kernels/phi4_kernels/op.py", "import phi4.errors", "may not import phi4"),
        ("kernels/phi4_kernels/op.py", "import einops", "may not import einops"),
        ("kernels/phi4_kernels/attention/op.py", "import flash_attn", "may not import flash_attn"),
        (
            "kernels/phi4_kernels/attention/flash_impl.py",
            "from flash_attn import x",
            "imports flash_attn inside a function only",
        ),
        ("phi4/engine/x.py", "import flash_attn", "flash_attn is imported in kernels/"),
        ("kernels/phi4_kernels/bench/providers/x.py", "import liger_kernel", "inside a function"),
        (
            "kernels/phi4_kernels/bench/providers/x.py",
            "def f():\n    import phi4.errors",
            "may not import phi4",
        ),
        ("phi4/train/x.py", "from megatron.core import mpu", "megatron is imported in phi4/engine"),
        ("phi4/cli.py", "import transformer_engine.pytorch", "transformer_engine is imported in"),
        ("phi4/track/console.py", "import mlflow", "mlflow is imported in phi4/track/mlflow/"),
        ("phi4/engine/x.py", "import transformers", "transformers is imported in phi4/convert/"),
        ("phi4/cli/x.py", "import fastapi", "fastapi is imported in phi4/serve/"),
        ("phi4/data/x.py", "import torch.distributed as dist", "may not use torch.distributed"),
        ("phi4/model/x.py", "from torch import distributed", "may not use torch.distributed"),
        ("phi4/track/x.py", "import torch\ntorch.distributed.barrier()", "x.py:2: track may not"),
        (
            "kernels/phi4_kernels/loss/triton_impl.py",
            "import torch.distributed",
            "triton_impl.py may not use torch.distributed",
        ),
        ("phi4/rundir/x.py", "import phi4.track", "may not import track"),
        ("phi4/rundir/x.py", "import torch", "rundir may not import torch"),
        ("phi4/launch/x.py", "def f():\n    import torch", "launch may not import torch"),
        ("phi4/oracles/x.py", "from torch import nn", "oracles may not import torch"),
        ("phi4/engine/x.py", "import os\nos.environ['A']", "os.environ is read in"),
        ("phi4/train/x.py", "import os\nos.getenv('A')", "os.getenv is read in"),
        ("phi4/config/x.py", "from os import environ", "os.environ is read in"),
        ("kernels/phi4_kernels/x.py", "import os\nos.environ", "os.environ is read in"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, path: str, text: str, message: str) -> None:
    found = planted(tmp_path, path, text)
    assert len(found) == 1
    assert message in found[0]
    assert found[0].startswith(path)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("phi4/train/x.py", "from phi4.engine import step\nfrom phi4 import __version__"),
        ("phi4/engine/a.py", "from phi4.engine.b import c\nfrom . import d"),
        ("phi4/engine/a.py", "import megatron.core\nimport phi4_kernels\nimport torch.distributed"),
        ("phi4/engine/platform.py", "import os\nos.environ"),
        ("phi4/track/mlflow/x.py", "import mlflow"),
        ("phi4/serve/app.py", "import fastapi\nfrom phi4.sampling import protocol"),
        ("phi4/engine/a.py", "from phi4.track import jsonl"),
        ("phi4/data/a.py", "import numpy\nfrom phi4.config import Recipe"),
        ("kernels/phi4_kernels/a/op.py", "import torch.distributed\nfrom phi4_kernels import b"),
        ("kernels/phi4_kernels/bench/providers/a.py", "def f():\n    import liger_kernel"),
        ("kernels/phi4_kernels/attention/flash_impl.py", "def f():\n    import flash_attn"),
        ("kernels/phi4_kernels/testing/a.py", "import os\nos.environ"),
    ],
)
def test_allowed_import_is_not(tmp_path: Path, path: str, text: str) -> None:
    assert planted(tmp_path, path, text) == []


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("phi4/data/files/a.py", "import phi4.data.stream.b", "files may not import stream"),
        ("phi4/data/stream/a.py", "from ..screens import b", "stream may not import screens"),
        ("phi4/data/stream/a.py", "import phi4.data.tokenize.b", "stream may not import tokenize"),
        (
            "phi4/data/vocabulary/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import phi4.data.files.b",
            "a.py:3: vocabulary may not import files",
        ),
        ("phi4/engine/model/a.py", "import phi4.engine.optimizer.b", "may not import optimizer"),
        ("phi4/engine/step.py", "from phi4.engine.engine import E", "step may not import engine"),
        ("phi4/engine/model/a.py", "from .. import fake_ranks", "may not import fake_ranks"),
        (
            "kernels/phi4_kernels/rope/op.py",
            "import phi4_kernels.swiglu.op",
            "rope may not import swiglu",
        ),
        (
            "kernels/phi4_kernels/testing/gluon/a.py",
            "import phi4_kernels.testing.rows",
            "testing.gluon may not import testing",
        ),
        ("kernels/phi4_kernels/errors.py", "import phi4_kernels.registry", "not a lower layer"),
        ("phi4/data/extract/a.py", "", "phi4.data.extract has no layer; give it one"),
    ],
)
def test_planted_import_within_a_package_is_found(
    tmp_path: Path, path: str, text: str, message: str
) -> None:
    write(
        tmp_path,
        {
            **{f"phi4/data/{name}/b.py": "" for name in ("files", "stream", "screens", "tokenize")},
            **{f"phi4/engine/{name}.py": "" for name in ("engine", "fake_ranks")},
            "phi4/engine/optimizer/b.py": "",
            **{f"kernels/phi4_kernels/{name}.py": "" for name in ("swiglu/op", "testing/rows")},
            "kernels/phi4_kernels/registry.py": "",
        },
    )
    assert violations(read_sources(tmp_path)) == []
    found = planted(tmp_path, path, text)
    assert len(found) == 1
    assert message in found[0]
    assert found[0].startswith(path)


def test_planted_cycle_of_files_without_a_layer_is_found(tmp_path: Path) -> None:
    # Neither import is upward: `session` has no layer, and stands above step and below it.
    write(
        tmp_path,
        {
            "phi4/engine/step.py": "import phi4.engine.session",
            "phi4/engine/session.py": "from phi4.engine.objective import f",
            "phi4/engine/objective.py": "",
        },
    )
    assert violations(read_sources(tmp_path)) == []
    write(tmp_path, {"phi4/engine/session.py": "from phi4.engine.engine import Engine"})
    write(tmp_path, {"phi4/engine/engine.py": "import phi4.engine.step"})
    assert violations(read_sources(tmp_path)) == [
        "parts of phi4.engine import each other: engine -> step -> session -> engine"
    ]


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        ({"a.py": "import phi4.b", "b.py": "from phi4.a import f"}, "phi4.a -> phi4.b -> phi4.a"),
        (
            {
                "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import b",
                "b.py": "def f():\n    from phi4.a import g",
            },
            "phi4.a -> phi4.b -> phi4.a",
        ),
        (
            {"p/__init__.py": "from phi4.p.a import f", "p/a.py": "from phi4.p import f"},
            "phi4.p -> phi4.p.a -> phi4.p",
        ),
        (
            {
                "p/__init__.py": "from .a import f",
                "p/a.py": "from phi4.p.c import f",
                "p/c.py": "from .d import f",
                "p/d.py": "import phi4.q",
                "q.py": "from phi4.p import f",
            },
            "phi4.p -> phi4.p.a -> phi4.p.c -> phi4.p.d -> phi4.q -> phi4.p",
        ),
        (
            {
                "a.py": "import phi4.b\nimport phi4.d",
                "b.py": "import phi4.c",
                "c.py": "import phi4.d",
                "d.py": "import phi4.a",
            },
            "phi4.a -> phi4.d -> phi4.a",
        ),
    ],
)
def test_planted_cycle_of_files_is_found(tmp_path: Path, files: dict[str, str], cycle: str) -> None:
    write(tmp_path, {f"phi4/{path}": text for path, text in files.items()})
    assert file_cycles(read_sources(tmp_path)) == [cycle]


def test_files_in_one_order_are_no_cycle(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "phi4/p/__init__.py": "from phi4.p.a import f",
            # The submodule, not the __init__ of the package.
            "phi4/p/a.py": "from phi4.p import b",
            "phi4/p/b.py": "import torch",
            "phi4/q.py": "from phi4.p import f\nfrom phi4.p import a",
        },
    )
    assert file_cycles(read_sources(tmp_path)) == []


def test_import_of_both_packages_is_lean(tmp_path: Path) -> None:
    script = (
        "import sys, threading, phi4, phi4_kernels\n"
        "heavy = {'triton', 'transformer_engine', 'megatron', 'mlflow', 'transformers'}\n"
        "heavy |= {'fastapi', 'uvicorn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
        "assert torch is None or not torch.distributed.is_initialized()\n"
        "assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
